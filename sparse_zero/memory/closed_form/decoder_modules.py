"""Which modules does a decoder call, in which order, and which parameters are each one's own?

As transformers 5.23 writes decoders of the Llama family and Bloom: in each layer a norm, attention, a norm, an MLP.
Only the order counts here, in which stage 3 gathers parameters, and which of them it gathers together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from sparse_zero.memory.closed_form.base_weights import BaseTensor
from sparse_zero.memory.closed_form.decoder_shape import DecoderShape
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.module_order import Module, Parameter
from sparse_zero.memory.closed_form.trained import Trained

_NORMS = ("input_layernorm", "post_attention_layernorm")


def layer_name(layer: int, module: str = "") -> str:
    """The name of a module here: "3.mlp.up_proj", or "3" for the layer."""
    return f"{layer}.{module}" if module else str(layer)


class _Parameters:
    """The parameters of all modules: of the base under the module's name, then what is trained of it."""

    def __init__(
        self, base: Sequence[BaseTensor], trained: Trained, job: MemoryJob, threshold: int, shape: DecoderShape
    ) -> None:
        self._own: dict[str, list[Parameter]] = defaultdict(list)
        self._adapters: dict[str, list[Parameter]] = defaultdict(list)
        # Of no linear: router, experts and norms of each layer, then what is trained of them; norms behind the last.
        self.loose: dict[int, list[Parameter]] = defaultdict(list)
        self.num_stacks = sum(1 for each in base if each.layer == 0 and each.is_matrix and not each.module)
        for weight in base:
            made = Parameter(numel=weight.numel, itemsize=weight.itemsize, persists=weight.numel <= threshold)
            (self._own[weight.module] if weight.module else self.loose[weight.layer]).append(made)
        for group in trained.groups:
            for each in group:
                made = Parameter(
                    numel=each.numel, itemsize=job.trained_bytes, requires_grad=True, persists=each.numel <= threshold
                )
                if job.method in ("lora", "dora"):
                    self._adapters[each.module].append(made)
                    continue
                module = each.module
                if job.method == "selection" and not module.startswith(f"{shape.layers_name}."):
                    module = {-1: "embedding", shape.num_layers: "head"}.get(each.layer, "")
                (self._own[module] if module else self.loose[each.layer]).append(made)

    def linear(self, name: str, full_name: str) -> Module:
        """A linear, with its adapter if it has one.

        PEFT's layer reads the dtype of its A itself, and so has it gathered from its beginning to its end. DoRA's
        module of magnitudes reads the weight, and calls A and B once more, for the norm of what they make of it, which
        has no backward.
        """
        own, adapters = self._own.get(full_name, []), self._adapters.get(full_name, [])
        if not adapters:
            return Module(name=name, parameters=own)
        base = Module(name=f"{name}.base_layer", parameters=own)
        pair = [
            Module(name=f"{name}.lora_{letter}", parameters=[each])
            for letter, each in zip("AB", adapters[:2], strict=True)
        ]
        if len(adapters) == 2:
            return Module(name=name, parameters=adapters[:1], children=[base, Module(name=f"{name}.dropout"), *pair])
        norm = [Module(name=each.name, parameters=each.parameters, has_backward=False) for each in pair]
        magnitude = Module(
            name=f"{name}.magnitude", parameters=[adapters[2], *(each for each in own if not each.persists)],
            children=[*norm, *pair],
        )  # fmt: skip
        return Module(name=name, parameters=adapters[:1], children=[base, magnitude])

    def of(self, name: str) -> list[Parameter]:
        """Those of the embedding or the head."""
        return self._own.get(name, [])


def _layer(shape: DecoderShape, number: int, parameters: _Parameters) -> Module:
    blocks: dict[str, list[Module]] = {}
    loose = parameters.loose.get(number, [])
    stacks = loose[: parameters.num_stacks] if shape.num_experts else []
    vectors = loose[len(stacks) :]
    split = (len(vectors) + 1) // 2
    for linear in shape.linears:
        block, _, _ = linear.name.rpartition(".")
        full_name = f"{shape.layers_name}.{layer_name(number, linear.name)}"
        members = blocks.setdefault(block, [])
        members.append(parameters.linear(layer_name(number, linear.name), full_name))
        # The activation follows the first linear of an MLP.
        if linear.reads == "mlp_input" and len(members) == 1:
            members.append(Module(name=layer_name(number, f"{block}.act_fn")))
    children: list[Module] = []
    for place, (block, members) in enumerate(blocks.items()):
        if place < len(_NORMS):
            own = vectors[:split] if place == 0 else vectors[split:]
            children.append(Module(name=layer_name(number, _NORMS[place]), parameters=own))
        children.append(Module(name=layer_name(number, block), children=members))
    if shape.num_experts:
        # The router, if it is told from the experts, is a module of its own.
        inner = [
            Module(name=layer_name(number, "mlp.gate"), parameters=stacks[:-2]),
            Module(name=layer_name(number, "mlp.experts"), parameters=stacks[-2:]),
        ]
        children.append(Module(name=layer_name(number, _NORMS[1]), parameters=vectors[split:]))
        children.append(Module(name=layer_name(number, "mlp"), children=inner))
    return Module(name=layer_name(number), children=children)


def decoder(
    shape: DecoderShape, base: Sequence[BaseTensor], trained: Trained, job: MemoryJob, threshold: int
) -> Module:
    """The model, as a tree of modules in the order of their calls.

    Args:
        shape: of the model.
        base: its frozen parameters.
        trained: what is trained beside or of them.
        job: what trains it.
        threshold: entries up to which a parameter stays whole from step to step.
    """
    parameters = _Parameters(base, trained, job, threshold, shape)
    embedding = parameters.of("embedding")
    head = embedding if shape.tied else parameters.of("head")
    layers = [_layer(shape, number, parameters) for number in range(shape.num_layers)]
    inner = Module(
        name="model",
        children=[
            Module(name="embedding", parameters=embedding, input_requires_grad=False),
            Module(name="positions"),
            *layers,
            Module(name="norm", parameters=parameters.loose.get(shape.num_layers, [])),
        ],
    )
    return Module(name="", children=[inner, Module(name="head", parameters=head)])


def persistent_bytes(root: Module, ranks: int) -> int:
    """Of the parameters that stay whole from step to step, all entries."""
    found: Mapping[int, Parameter] = {id(each): each for each in _parameters(root) if each.persists}
    return 0 if ranks == 1 else sum(-(-each.numel // ranks) * ranks * each.itemsize for each in found.values())


def _parameters(module: Module) -> list[Parameter]:
    return [*module.parameters, *(each for child in module.children for each in _parameters(child))]
