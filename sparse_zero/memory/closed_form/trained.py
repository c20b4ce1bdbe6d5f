"""What is trained of each linear and of everything else, in the numbers that memory follows from?"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_zero.errors import InputError
from sparse_zero.layers.sparsify import keeps_input
from sparse_zero.memory.closed_form.decoder_shape import DecoderShape, LinearShape
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.selection.config import KINDS, Kind
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.optimizers import module_entry


@dataclass(frozen=True, kw_only=True)
class TrainedLinear:
    """What is trained of one linear; nothing by default."""

    # Trained entries by kind of region.
    entries: Mapping[Kind, int]
    # (height, width) of blocks, how many there are, and in how many distinct column strips they lie.
    block_shape: tuple[int, int] = (0, 0)
    num_blocks: int = 0
    num_strips: int = 0
    num_rows: int = 0
    num_columns: int = 0
    # Whether backward keeps the whole input instead of slices.
    keeps_input: bool = False
    # Of a linear that calibration observes, which trains nothing: bytes that it keeps of its input for each token, and
    # that it takes when the gradient of its output is there.
    kept_per_token: int = 0
    backward_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainedTensor:
    """One parameter that the optimizer is given."""

    # Of the module it belongs to: "model.layers.0.self_attn.q_proj"; "" where it has no linear's name.
    module: str
    numel: int
    # Of the decoder layer, from 0; -1: before all layers (the embedding), the number of layers: after them.
    layer: int
    # Entries in one run of indices that are kept for it: int64, on the device.
    index_entries: int = 0
    # Of a matrix: adapters and weights; values are vectors, whatever they stand for.
    is_matrix: bool = False


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a job trains."""

    # By the linear's full name; those without anything are absent.
    linears: Mapping[str, TrainedLinear]
    # Entries that are trained, each once.
    num_parameters: int
    # Of those, the ones outside of the layers' linears, by the name of their parameter.
    others: Mapping[str, int]
    # The optimizer's groups, each with its parameters in the order of the model.
    groups: tuple[tuple[TrainedTensor, ...], ...] = ()
    # The kind of region of each group; "whole" where whole tensors are trained.
    kinds: tuple[Kind, ...] = ()

    def tensors(self) -> Iterator[TrainedTensor]:
        """The parameters of all groups."""
        for group in self.groups:
            yield from group


def _of(chosen: WeightSelection, entries: Mapping[Kind, int], keeps: bool) -> TrainedLinear:
    return TrainedLinear(
        entries=entries,
        block_shape=chosen.block_shape,
        num_blocks=len(chosen.blocks),
        num_strips=len(chosen.blocks[:, 1].unique()),
        num_rows=len(chosen.rows),
        num_columns=len(chosen.columns),
        keeps_input=keeps,
    )


def _index_entries(chosen: WeightSelection, kind: Kind, num_entries: int, num_strips: int) -> int:
    """Entries of the indices that :class:`~sparse_zero.layers.sparse_linear.SparseLinear` keeps for one kind."""
    out_features, in_features = chosen.shape
    dense, indices = {
        "block": (
            len(chosen.blocks) * chosen.block_shape[0] * chosen.block_shape[1],
            3 * len(chosen.blocks) + num_strips,
        ),
        "row": (len(chosen.rows) * in_features, len(chosen.rows)),
        "column": (len(chosen.columns) * out_features, len(chosen.columns)),
        "whole": (num_entries, 0),
    }[kind]
    # Where another kind owns a part of the regions, or they reach beyond the edge, each entry is listed.
    return indices + (num_entries if num_entries < dense else 0)


def _layer_of(shape: DecoderShape, name: str) -> int:
    """Of a parameter or module, by its name; what lies outside of the layers comes first, or, as heads do, last."""
    prefix = f"{shape.layers_name}."
    if name.startswith(prefix):
        return int(name[len(prefix) :].partition(".")[0])
    return -1 if "emb" in name else shape.num_layers


def _of_selection(
    shape: DecoderShape,
    selection: Selection,
    shared_inputs: Sequence[Sequence[str]],
    per_module: Sequence[Sequence[str]],
) -> Trained:
    names = {
        f"{shape.layers_name}.{index}.{linear.name}" for index in range(shape.num_layers) for linear in shape.linears
    }
    weights = {name.removesuffix(".weight"): chosen for name, chosen in selection.weights.items()}
    inside = {name: chosen for name, chosen in weights.items() if name in names}
    counts = {name: chosen.num_parameters_by_kind() for name, chosen in weights.items()}
    kept = keeps_input(inside, shared_inputs)
    linears = {name: _of(chosen, counts[name], kept[name]) for name, chosen in inside.items()}
    # By kind, and by the entry of per_module that they follow.
    tensors: dict[tuple[Kind, int], list[TrainedTensor]] = {}
    for full_name, chosen in selection.weights.items():
        name = full_name.removesuffix(".weight")
        entry = module_entry(per_module, full_name.partition("[")[0]) if per_module else None
        for kind, num_entries in counts[name].items():
            if not num_entries:
                continue
            if name in linears:
                indices = _index_entries(chosen, kind, num_entries, linears[name].num_strips)
            else:
                # On the hook path every entry has its position; a head, which is a linear, has indices of regions.
                is_head = not shape.tied and _layer_of(shape, name) == shape.num_layers and kind != "whole"
                strips = len(chosen.blocks[:, 1].unique())
                indices = _index_entries(chosen, kind, num_entries, strips) if is_head else num_entries
            # The matrices of a stack are parts of one parameter.
            module = name.partition("[")[0]
            made = tensors.setdefault((kind, -1 if entry is None else entry), [])
            if made and made[-1].module == module:
                numel, indices = made[-1].numel + num_entries, made[-1].index_entries + indices
                made.pop()
            else:
                numel = num_entries
            made.append(TrainedTensor(module=module, numel=numel, layer=_layer_of(shape, name), index_entries=indices))
    keys = sorted(tensors, key=lambda key: (KINDS.index(key[0]), key[1]))
    numbers = {linear.name: number for number, linear in enumerate(shape.linears)}

    def order(tensor: TrainedTensor) -> tuple[int, int]:
        """In the model: linears of a layer in their order, then its norms."""
        name = tensor.module.removeprefix(f"{shape.layers_name}.{tensor.layer}.")
        return tensor.layer, numbers.get(name, len(numbers))

    return Trained(
        linears=linears,
        num_parameters=sum(each.numel for group in tensors.values() for each in group),
        others={name: sum(counts[name].values()) for name in weights if name not in names},
        groups=tuple(tuple(sorted(tensors[key], key=order)) for key in keys),
        kinds=tuple(kind for kind, _ in keys),
    )


def _of_model(shape: DecoderShape) -> Trained:
    tensors = tuple(
        TrainedTensor(module=module, numel=numel, layer=layer, is_matrix=is_matrix)
        for module, numel, layer, is_matrix in base_tensors(shape)
    )
    return Trained(
        linears={}, num_parameters=sum(each.numel for each in tensors), others={}, groups=(tensors,), kinds=("whole",)
    )


def adapter_entries(linear: LinearShape, rank: int, *, magnitude: bool) -> list[int]:
    """Entries of the adapter of one linear, as PEFT has them: A [rank, in], B [out, rank], DoRA's magnitudes [out]."""
    found = [rank * linear.in_features, linear.out_features * rank]
    return [*found, linear.out_features] if magnitude else found


def _of_adapters(shape: DecoderShape, job: MemoryJob) -> Trained:
    tensors = tuple(
        TrainedTensor(
            module=f"{shape.layers_name}.{layer}.{linear.name}", numel=numel, layer=layer, is_matrix=number < 2
        )
        for layer in range(shape.num_layers)
        for linear in shape.linears
        if linear.name.rpartition(".")[2] in job.lora_targets
        for number, numel in enumerate(adapter_entries(linear, job.lora_rank, magnitude=job.method == "dora"))
    )
    return Trained(
        linears={}, num_parameters=sum(each.numel for each in tensors), others={}, groups=(tensors,), kinds=("whole",)
    )


def _stacks(shape: DecoderShape) -> tuple[int, ...]:
    """Entries of the router and the experts of one layer: of each expert gate and up as one matrix, and down."""
    expert, router = shape.intermediate_size * shape.hidden_size, shape.num_experts * shape.hidden_size
    if not shape.num_experts:
        return ()
    # Whether they are gated, their number of entries tells: the shape speaks of linears.
    for inner in (2 * expert, expert):
        found = (router, shape.num_experts * inner, shape.num_experts * expert)
        if sum(found) <= shape.other_parameters:
            return found
    return (shape.other_parameters,)


def base_tensors(shape: DecoderShape) -> Iterator[tuple[str, int, int, bool]]:
    """The model's parameters in their order: (module, entries, layer, whether it is a matrix).

    Parameters of a layer that are no linear's count as vectors of the hidden size, but for experts and their router.
    """
    width = shape.hidden_size
    yield "embedding", shape.vocab_size * width, -1, True
    for layer in range(shape.num_layers):
        for linear in shape.linears:
            name = f"{shape.layers_name}.{layer}.{linear.name}"
            yield name, linear.out_features * linear.in_features, layer, True
            if linear.has_bias:
                yield name, linear.out_features, layer, False
        rest = shape.other_parameters
        for numel in _stacks(shape):
            yield "", numel, layer, True
            rest -= numel
        while rest > 0:
            yield "", min(rest, width), layer, False
            rest -= width
    rest = shape.outer_parameters
    while rest > 0:
        yield "", min(rest, width), shape.num_layers, False
        rest -= width
    if not shape.tied:
        yield "head", shape.vocab_size * width, shape.num_layers, True


# What was found of each selection that is still there, by its identity, for which no digest of its indices is needed;
# and by the shape, the linears that share inputs, and the modules with rates of their own.
_KNOWN: dict[int, dict[tuple[Any, ...], Trained]] = {}


def trained_of(
    shape: DecoderShape, job: MemoryJob, selection: Selection | None, shared_inputs: Sequence[Sequence[str]] = ()
) -> Trained:
    """What ``job`` trains; see :func:`sparse_zero.memory.closed_form.forecast.forecast_memory` for the arguments.

    Raises:
        InputError: the method needs a selection, or adapters have no linear to go to.
    """
    if job.method == "full":
        return _of_model(shape)
    if job.method in ("lora", "dora"):
        found = _of_adapters(shape, job)
        if not found.num_parameters:
            names = sorted({linear.name.rpartition(".")[2] for linear in shape.linears})
            raise InputError(f"lora_targets is {job.lora_targets}: no linear bears such a name, but {', '.join(names)}")
        return found
    if selection is None:
        raise InputError("the method 'selection' is forecast for a selection: give one, chosen at random if need be")
    # Of a selection it follows from little else of the job: a search asks for it again and again.
    if id(selection) not in _KNOWN:
        _KNOWN[id(selection)] = {}
        weakref.finalize(selection, _KNOWN.pop, id(selection), None)
    known, key = _KNOWN[id(selection)], (shape, tuple(tuple(names) for names in shared_inputs), job.per_module)
    if key not in known:
        known[key] = _of_selection(shape, selection, shared_inputs, job.per_module)
    return known[key]
