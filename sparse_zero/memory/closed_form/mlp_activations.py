"""What does the MLP of one layer keep and hold: gated, plain, or a mixture of experts?"""

from __future__ import annotations

from collections.abc import Mapping

from sparse_zero.memory.closed_form.decoder_shape import LinearShape
from sparse_zero.memory.closed_form.linear_activations import LinearUse
from sparse_zero.memory.closed_form.steps import Beside, Sizes, Step

# What is kept, in the words of the docs.
MLP = "MLP"
EXPERTS = "experts"
INPUTS = "for trained parts"
COPIES = "weights with values"
# Of a kind of its own: see :meth:`~sparse_zero.memory.closed_form.kept_activations.Held.terms`.
GATHERED = "experts that stay gathered"


def mlp_steps(
    sizes: Sizes,
    uses: Mapping[str, LinearUse],
    beside: Beside,
    *,
    has_graph: bool,
) -> list[Step]:
    """From the normalized stream to the output of the last linear, of a dense MLP.

    Args:
        sizes: of the micro-batch.
        uses: of the layer's linears, by their names.
        beside: the residual stream, its gradient, and the normalized stream.
        has_graph: whether the input requires grad.
    """
    shape = sizes.shape
    inputs, outputs = shape.reading("mlp_input"), shape.reading("mlp_output")
    if not inputs or not outputs:
        return []
    first, last = inputs[0], outputs[-1]
    wide = sizes.of(last.in_features)
    is_gated = shape.mlp == "gated" and len(inputs) > 1
    if is_gated:
        steps = _gated(sizes, uses, inputs, wide, beside, has_graph)
    else:
        steps = _plain(sizes, uses, first, wide, beside, has_graph)
    has_graph = has_graph or any(uses[each.name].is_trained for each in inputs)
    use = uses[last.name].given(has_graph)
    kept = use.kept + (wide if use.keeps_input else 0)
    return [
        *steps,
        Step(
            name=last.name,
            kept={INPUTS: kept} if kept else {},
            forward=beside.forward + (0 if use.keeps_input else wide) + sizes.stream + use.forward,
            unrepeated=use.forward_after,
            alone=beside.alone + wide + sizes.stream + use.alone,
            backward=beside.backward + (use.backward if has_graph else use.backward_first)
            if has_graph or use.is_trained
            else None,
        ),
    ]


def linear_step(
    sizes: Sizes,
    linear: LinearShape,
    use: LinearUse,
    beside: Beside,
    *,
    has_graph: bool,
    keeps_new: int,
) -> Step:
    """A linear inside of a layer, whose output something else keeps or not.

    Args:
        sizes: of the micro-batch.
        linear: its shape.
        use: of it.
        beside: what others hold, without its output and the gradient of that.
        has_graph: whether its input requires grad.
        keeps_new: bytes of its input if it is the first that keeps it.
    """
    output, kept = sizes.of(linear.out_features), use.kept + keeps_new
    is_reached = has_graph or use.is_trained
    return Step(
        name=linear.name,
        kept={INPUTS: kept} if kept else {},
        forward=beside.forward + output + use.forward,
        alone=beside.alone + output + use.alone,
        backward=beside.backward + output + (use.backward if has_graph else use.backward_first) if is_reached else None,
    )


def _gated(
    sizes: Sizes,
    uses: Mapping[str, LinearUse],
    inputs: tuple[LinearShape, ...],
    wide: int,
    beside: Beside,
    has_graph: bool,
) -> list[Step]:
    gate, up = inputs[0], inputs[1]
    stream = sizes.stream
    is_reached = has_graph or uses[gate.name].is_trained
    up_reached = has_graph or uses[up.name].is_trained
    up_keeps = uses[up.name].keeps_input and not uses[gate.name].keeps_input
    # The gradient of the input, from up, waits for the one from gate.
    waits = stream if has_graph else 0
    return [
        linear_step(
            sizes, gate, uses[gate.name], beside.plus(backward=waits), has_graph=has_graph,
            keeps_new=stream if uses[gate.name].keeps_input else 0,
        ),
        Step(
            name="mlp.act_fn",
            kept={MLP: wide} if is_reached else {},
            forward=beside.forward + wide,
            alone=beside.alone + 2 * wide,
            backward=beside.backward + waits + 2 * wide if is_reached else None,
        ),
        linear_step(
            sizes, up, uses[up.name], beside.plus(wide, wide), has_graph=has_graph,
            keeps_new=stream if up_keeps else 0,
        ),
        Step(
            name="mlp",
            kept={MLP: 2 * wide} if is_reached or up_reached else {},
            forward=beside.forward + wide,
            alone=beside.alone + 3 * wide,
            backward=beside.backward + 3 * wide if is_reached or up_reached else None,
        ),
    ]  # fmt: skip


def _plain(
    sizes: Sizes,
    uses: Mapping[str, LinearUse],
    first: LinearShape,
    wide: int,
    beside: Beside,
    has_graph: bool,
) -> list[Step]:
    use = uses[first.name]
    is_reached = has_graph or use.is_trained
    # Bloom spells its activation out, forward and backward; torch's own is one kernel.
    is_spelled_out = sizes.shape.model_type == "bloom"
    forward, backward = (4, 6) if is_spelled_out else (1, 2)
    return [
        linear_step(
            sizes, first, use, beside, has_graph=has_graph,
            keeps_new=sizes.stream if use.keeps_input else 0,
        ),
        Step(
            name="mlp",
            kept={MLP: wide} if is_reached else {},
            forward=beside.forward + forward * wide,
            alone=beside.alone + (1 + forward) * wide,
            backward=beside.backward + backward * wide if is_reached else None,
        ),
    ]  # fmt: skip


def expert_steps(sizes: Sizes, beside: Beside, *, has_graph: bool, is_trained: bool, keeps_input: bool) -> list[Step]:
    """A mixture of experts: each token goes through some, sorted by expert, and their outputs are weighed and added.

    Args:
        sizes, beside: see :func:`mlp_steps`.
        has_graph: whether the input requires grad.
        is_trained: whether the experts' weights are, all of them or entries.
        keeps_input: whether the router's input is kept for it.
    """
    shape, job = sizes.shape, sizes.job
    num_pairs = sizes.tokens * shape.experts_per_token
    # [pairs, hidden], [pairs, intermediate] and [pairs, hidden] in fp32.
    routed, wide = num_pairs * shape.hidden_size * sizes.element, num_pairs * shape.intermediate_size * sizes.element
    # Mixtral weighs the outputs in fp32, others in their own dtype.
    is_wide = shape.model_type == "mixtral" and sizes.is_low
    summed = 4 * num_pairs * shape.hidden_size if is_wide else routed
    stack = shape.num_experts * shape.intermediate_size * shape.hidden_size * job.element_bytes if is_trained else 0
    # Softmax in fp32 and its sums; weights of the pairs; where each pair goes, in four lists of int64.
    router = 4 * sizes.tokens * (shape.num_experts + 1) + (2 * 4 + 4 * 8) * num_pairs
    is_reached = has_graph or is_trained
    inputs = routed if is_trained else 0
    # Under delta the weights with the values added, which gradients of what they multiply need; stage 3 adds them anew.
    copies = stack if job.method == "selection" and job.placement == "delta" and job.stage != 3 else 0
    held = beside.plus(0 if is_trained else routed, alone=routed + router)
    # Backward reads views of the gathered stacks, which hold their memory when stage 3 gives them back. While they
    # compute, they are counted among what is gathered. Checkpointing's repetition keeps them gathered anyway.
    stays = is_reached and job.stage == 3 and job.world_size > 1 and not job.gradient_checkpointing and not copies
    viewed = shape.num_experts * shape.intermediate_size * shape.hidden_size * sizes.element if stays else 0
    return [
        Step(
            name="mlp.gate",
            kept={EXPERTS: router, INPUTS: sizes.stream if keeps_input else 0} if has_graph else {},
            forward=beside.forward + router,
            alone=beside.alone + router,
            backward=beside.backward + 3 * sizes.stream if has_graph else None,
        ),
        Step(
            name="mlp.experts",
            kept={INPUTS: inputs, COPIES: 2 * copies if has_graph else 0, GATHERED: 2 * viewed},
            forward=held.forward + 2 * wide,
            counted=2 * viewed,
            alone=held.alone + 2 * wide,
            backward=beside.backward + 2 * stack + 2 * wide + routed if is_reached else None,
        ),
        Step(
            name="mlp.experts",
            kept={EXPERTS: 3 * wide} if is_reached else {},
            forward=held.forward + wide,
            counted=2 * viewed,
            alone=held.alone + 4 * wide,
            backward=beside.backward + 3 * wide if is_reached else None,
        ),
        Step(
            name="mlp.experts",
            kept={INPUTS: wide if is_trained else 0, COPIES: copies, GATHERED: viewed},
            forward=held.forward + (0 if is_trained else wide) + routed,
            counted=3 * viewed,
            alone=held.alone + routed + wide,
            backward=beside.backward + stack + routed + wide if is_reached else None,
        ),
        Step(
            name="mlp.experts",
            kept={EXPERTS: routed} if has_graph else {},
            forward=held.forward + 2 * summed + (0 if has_graph else routed),
            counted=3 * viewed,
            alone=held.alone + routed + 2 * summed,
            backward=beside.backward + 3 * summed + (routed if is_wide else 0) if is_reached else None,
        ),
    ]
