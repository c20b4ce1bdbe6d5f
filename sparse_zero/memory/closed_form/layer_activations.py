"""What does one decoder layer keep and hold, step by step?

    norm, q, k, v, attention, o, add, norm, MLP, add

Read off the code of transformers 5.23; ``tests/sparse_zero/test_forecast_activations.py`` says what broke when a new
version keeps something else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sparse_zero.memory.closed_form.attention_activations import attention_steps
from sparse_zero.memory.closed_form.linear_activations import LinearUse
from sparse_zero.memory.closed_form.mlp_activations import INPUTS, expert_steps, linear_step, mlp_steps
from sparse_zero.memory.closed_form.steps import Beside, Sizes, Step

NORMS = "norms"


def norm_step(sizes: Sizes, name: str, beside: Beside, *, has_graph: bool, is_trained: bool) -> Step:
    """A norm of the residual stream."""
    stream, wide = sizes.stream, 4 * sizes.tokens * sizes.shape.hidden_size
    is_reached = has_graph or is_trained
    if sizes.shape.norm == "layer":
        # The stream itself, and mean and deviation of each token.
        return Step(
            name=name,
            kept={NORMS: stream + 8 * sizes.tokens} if is_reached else {},
            forward=beside.forward + stream,
            alone=beside.alone + stream,
            backward=beside.backward + 2 * stream if is_reached else None,
        )
    # What is normalized, in fp32 (the stream itself, or a copy), and a factor for each token; for the gradient of the
    # weight also what it multiplies, which is gone by the time that the norm's own gradient takes most.
    own, scaled = wide + 4 * sizes.tokens if has_graph else 0, stream if is_trained else 0
    copy = wide if sizes.is_low else 0
    return Step(
        name=name,
        kept={NORMS: own + scaled} if is_reached else {},
        forward=beside.forward + wide + stream + (stream if sizes.is_low and not is_trained else 0),
        alone=beside.alone + copy + wide + stream,
        backward=beside.backward + 5 * wide - scaled if is_reached else None,
    )


def keeps_stream(sizes: Sizes) -> bool:
    """Whether norms keep the residual stream itself, and not a copy of it."""
    return sizes.shape.norm == "layer" or not sizes.is_low


def layer_steps(
    sizes: Sizes, uses: Mapping[str, LinearUse], *, has_graph: bool, trained: Collection[str] = ()
) -> tuple[list[Step], bool]:
    """The steps of one layer, and whether its output requires grad.

    Args:
        sizes: of the micro-batch.
        uses: of the layer's linears, by their names.
        has_graph: whether its input requires grad.
        trained: names within the layer of trained parameters that no linear has: norms', experts'. "*": all.
    """
    shape, stream = sizes.shape, sizes.stream
    names = "input_layernorm", "post_attention_layernorm"
    first, second = (_is_trained(name, trained) for name in names)
    # In backward the gradient of the residual stream is there all the time, and in forward the layer's input.
    beside = Beside(forward=_unkept(sizes, has_graph), alone=stream, backward=stream)
    # Eager attention also returns its probabilities, which nobody reads: a variable holds them until the layer returns,
    # or, with Bloom, until the next one has.
    probabilities = sizes.scores * sizes.element if sizes.attention == "eager" else 0
    if shape.model_type == "bloom":
        beside = beside.plus(0, alone=probabilities)
    steps = [norm_step(sizes, names[0], beside, has_graph=has_graph, is_trained=first)]
    attention, reached = _attention_half(sizes, uses, beside, has_graph or first)
    steps += attention
    beside = beside.plus(_unkept(sizes, reached), alone=stream + probabilities)
    steps.append(norm_step(sizes, names[1], beside, has_graph=reached, is_trained=second))
    is_normed = reached or second
    inputs, outputs = shape.reading("mlp_input"), shape.reading("mlp_output")
    uses = {name: use.given(is_normed) for name, use in uses.items()}
    of_experts, of_router = _is_trained("mlp.experts", trained), _is_trained("mlp.gate", trained)
    is_kept = any(uses[each.name].keeps_input for each in inputs)
    # At stage 3 DeepSpeed's linear keeps the input of a router, which is no module of torch's, for any method.
    is_routed = of_router or (bool(shape.num_experts) and sizes.job.stage == 3 and is_normed)
    beside = beside.plus(0 if is_kept or is_routed else stream, alone=stream)
    if shape.num_experts:
        steps += expert_steps(
            sizes, beside, has_graph=is_normed, is_trained=of_experts, keeps_input=is_routed and not is_kept
        )
    steps += mlp_steps(sizes, uses, beside, has_graph=is_normed)
    of_linears = any(uses[each.name].is_trained for each in (*inputs, *outputs))
    return steps, is_normed or of_linears or of_experts or of_router


def _is_trained(name: str, trained: Collection[str]) -> bool:
    return "*" in trained or any(each == name or each.startswith((f"{name}.", f"{name}[")) for each in trained)


def _unkept(sizes: Sizes, has_graph: bool) -> int:
    """The residual stream in forward, where no norm keeps it."""
    return 0 if has_graph and keeps_stream(sizes) else sizes.stream


def _attention_half(
    sizes: Sizes, uses: Mapping[str, LinearUse], beside: Beside, has_graph: bool
) -> tuple[list[Step], bool]:
    shape, stream = sizes.shape, sizes.stream
    inputs, outputs = shape.reading("attention_input"), shape.reading("attention_output")
    uses = {name: use.given(has_graph) for name, use in uses.items()}
    keepers = [each for each in inputs if uses[each.name].keeps_input]
    beside = beside.plus(0 if keepers else stream, alone=stream)
    steps: list[Step] = []
    made = 0
    for number, linear in enumerate(inputs):
        # Outputs so far, whose gradients wait; and the gradient of the input so far, where others came first.
        others = stream if has_graph and number + 1 < len(inputs) else 0
        steps.append(
            linear_step(
                sizes, linear, uses[linear.name], beside.plus(made, made + others), has_graph=has_graph,
                keeps_new=stream if keepers[:1] == [linear] else 0,
            )
        )  # fmt: skip
        made += sizes.of(linear.out_features)
    reached = has_graph or any(uses[each.name].is_trained for each in inputs)
    steps += attention_steps(sizes, beside, has_graph=reached)
    if not outputs:
        return steps, reached
    output = outputs[0]
    use = uses[output.name].given(reached)
    # Torch's kernels keep their output, which is this input; the eager products make a copy.
    is_copy = sizes.attention == "eager" or not reached
    kept = use.kept + (sizes.queries if use.keeps_input and is_copy else 0)
    steps.append(
        Step(
            name=output.name,
            kept={INPUTS: kept} if kept else {},
            forward=beside.forward + (sizes.queries if is_copy and not use.keeps_input else 0) + stream + use.forward,
            alone=beside.alone + sizes.queries + stream + use.alone,
            backward=stream + (use.backward if reached else use.backward_first) if reached or use.is_trained else None,
        )
    )
    return steps, reached or use.is_trained
