"""How does every rank load only its own part of a model, for ZeRO stage 3?

The model is built without weights. Then each rank reads, of every tensor in the safetensors files, the bytes of its own
shard: a shard is a range of the flat parameter, and a tensor lies in its file as one flat range.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.compat import ignored_names, keeps_float32, transformers_names
from models.gather import gather_json
from models.heads import deviation_of, fresh_head, head_is_new, new_weight, not_of_head, remember_head
from models.loading import ModelConfig, check_weights_fit, load_model, model_folder
from models.skeleton import load_empty
from models.weight_files import StoredTensor, check_weights, stored_tensors
from sparse_zero.collectives import failing_together
from sparse_zero.errors import InputError
from sparse_zero.zero import compat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the safetensors format calls the dtypes that weights have. Others, in particular quantised ones, are not read.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Buffers are no weights: they may be of these, too.
_BUFFER_DTYPES = {**_DTYPES, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
# Numbers that are read at once, through memory of their own.
_NUM_AT_ONCE = 2**20

# Fills a 1-D tensor with the numbers of a stored tensor from an index on.
Reader = Callable[[StoredTensor, Tensor, int], None]


class ShardedLoadingWarning(UserWarning):
    """The model is sharded, but one rank held all of it meanwhile; the message says why."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is read from where; or why the shards have to come from rank 0."""

    # Names in the model that are one parameter, and where it lies. The first name has been found in the files. None: it
    # is a weight of the head, which the files lack.
    parameters: tuple[tuple[tuple[str, ...], StoredTensor | None], ...] = ()
    # Names in the model of persistent buffers, and where they lie.
    buffers: tuple[tuple[str, StoredTensor], ...] = ()
    # None: every rank can read its own part.
    reason: str | None = None


def load_sharded(
    config: ModelConfig,
    deepspeed_config: Mapping[str, Any],
    *,
    read: Reader | None = None,
    head_seed: int | None = None,
) -> PreTrainedModel:
    """The model that :func:`models.loading.load_model` gives, frozen, and in shards from the start. Collective.

    No rank ever holds more than its shards and one whole weight. Weights that a rank offloads (``offload_param``) go to
    where they are offloaded to. Forward needs hooks that gather the weights:
    :func:`sparse_zero.zero.inference.sharded_forward`, or a training engine.

    Where the files do not hold the model's parameters as they are (GGUF; experts that transformers stacks; parts that
    it keeps in float32), rank 0 loads the whole model on its host and gives every rank its shards.

    Args:
        config: which model.
        deepspeed_config: of the engine that will train it, at stage 3.
        read: reads a part of a tensor; default: :func:`read_part`.
        head_seed: see :func:`~models.loading.load_model`.

    Raises:
        InputError: on all ranks together, as :func:`~models.loading.load_model` does.
    """
    read = read_part if read is None else read
    with failing_together():
        if config.quantization != "none":
            raise InputError(
                f"model.quantization is {config.quantization!r} at zero.stage 3, which would cut packed numbers into "
                "shards: use stage 0, 1 or 2, or none"
            )
        folder = model_folder(config)
        model = load_empty(config)
        plan = _plan(config, folder, model)
    reasons = gather_json(plan.reason)
    reason = next((each for each in reasons if each is not None), None)
    init = compat.start_sharding(deepspeed_config)
    if reason is not None:
        return _load_on_rank_zero(config, folder, model, init, reason, head_seed)
    _agree_on_ties(plan)
    with failing_together():
        owners = _owners(model)
        for names, stored in plan.parameters:
            described = owners[names[0]][0]._parameters[names[0].rpartition(".")[2]]
            assert described is not None
            part = _part_made(model, names[0], described.shape, head_seed) if stored is None else _part_of(read, stored)
            _put(owners, names, compat.new_shards(init, described.shape, described.dtype, part))
        for name, stored in plan.buffers:
            buffer = model.get_buffer(name)
            whole = torch.empty(buffer.shape, dtype=buffer.dtype)
            read(stored, whole.view(-1), 0)
            buffer.copy_(whole)
    for buffer_owner, name, buffer in _buffers(model):
        buffer_owner._buffers[name] = buffer.to(init.local_device)
    remember_head(model, [names[0] for names, stored in plan.parameters if stored is None])
    return model.eval()


def read_part(stored: StoredTensor, out: Tensor, start: int) -> None:
    """Fill the 1-D ``out`` with the numbers of a stored tensor from index ``start`` on, rounded to its dtype.

    Raises:
        InputError: the file cannot be read, or has become shorter.
    """
    dtype = _BUFFER_DTYPES[stored.dtype]
    # Numbers of the wanted dtype go straight to the host's memory, others through a buffer.
    direct = out.dtype == dtype and out.device.type == "cpu"
    buffer = torch.empty(0 if direct else min(_NUM_AT_ONCE, len(out)), dtype=dtype)
    try:
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.offset + start * dtype.itemsize)
            for piece in out.split(_NUM_AT_ONCE):
                _read_exactly(file, piece if direct else buffer[: len(piece)])
                if not direct:
                    piece.copy_(buffer[: len(piece)])
    except OSError as error:
        raise InputError(f"{stored.path} cannot be read ({error}): copy or download it again") from error


def _read_exactly(file: Any, out: Tensor) -> None:
    view = out.view(torch.uint8).numpy().data
    while view:
        size = file.readinto(view)
        if not size:
            raise OSError("it ends too early")
        view = view[size:]


def _part_of(read: Reader, stored: StoredTensor) -> Callable[[Tensor, int], None]:
    def part(out: Tensor, start: int) -> None:
        read(stored, out, start)

    return part


def _part_made(
    model: PreTrainedModel, name: str, shape: Sequence[int], seed: int | None
) -> Callable[[Tensor, int], None]:
    assert seed is not None, "a head that the files lack needs head_seed"
    whole = new_weight(name, shape, seed, deviation_of(model)).view(-1)

    def part(out: Tensor, start: int) -> None:
        out.copy_(whole[start : start + len(out)])

    return part


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The module and attribute that hold each parameter, by all of its names."""
    return {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _put(owners: Mapping[str, tuple[nn.Module, str]], names: Sequence[str], parameter: nn.Parameter) -> None:
    for name in names:
        module, attribute = owners[name]
        setattr(module, attribute, parameter)


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                yield module, name, buffer


def _plan(config: ModelConfig, folder: Path, model: PreTrainedModel) -> _Plan:
    """Compare the names, shapes and dtypes of the files with the model's.

    Raises:
        InputError: they do not belong together.
    """
    if config.gguf_file is not None:
        return _Plan(reason=f"{config.gguf_file} is a GGUF file, whose blocks are dequantised")
    if keeps_float32(model, getattr(torch, config.dtype)):
        return _Plan(reason=f"transformers keeps parts of this model in float32 beside {config.dtype}")
    meta = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if meta:
        return _Plan(reason=f"{meta[0]} is computed from weights")
    files = stored_tensors(check_weights(folder))
    names = transformers_names(model, files)
    if names is None:
        return _Plan(reason="its files hold weights apart that transformers stacks, or together that it splits")
    stored = {names[name]: tensor for name, tensor in files.items()}
    tied: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied[id(parameter)].append(name)
    own = model.state_dict()
    buffers = sorted(set(own) - {name for group in tied.values() for name in group})
    missing_allowed, unexpected_allowed = ignored_names(model)
    groups = [[*(name for name in group if name in stored), *(name for name in group if name not in stored)]
              for group in tied.values()]  # fmt: skip
    missing = [group[0] for group in groups if group[0] not in stored]
    missing += [name for name in buffers if name not in stored]
    unexpected = [name for name in stored if name not in own and not _matches(unexpected_allowed, name)]
    mismatched = [name for name in own if name in stored and stored[name].shape != tuple(own[name].shape)]
    made: set[str] = set()
    if head_is_new(config, folder):
        lacking, unexpected = not_of_head(model, missing, unexpected)
        made = {name for name in missing if name not in lacking and name not in buffers}
        missing = [name for name in missing if name not in made]
    check_weights_fit(
        folder,
        missing=[name for name in missing if not _matches(missing_allowed, name)],
        unexpected=unexpected,
        mismatched=mismatched,
    )
    if missing:
        return _Plan(reason=f"its files lack {missing[0]}, which transformers then makes")
    groups, new = [group for group in groups if group[0] not in made], [group for group in groups if group[0] in made]
    used = {name: _DTYPES for group in groups for name in group} | dict.fromkeys(buffers, _BUFFER_DTYPES)
    strange = [name for name, known in used.items() if name in stored and stored[name].dtype not in known]
    if strange:
        return _Plan(reason=f"{strange[0]} is stored as {stored[strange[0]].dtype}")
    return _Plan(
        parameters=tuple(
            [(tuple(each), stored[each[0]]) for group in groups for each in _untied(group, stored)]
            + [(tuple(group), None) for group in new]
        ),
        buffers=tuple((name, stored[name]) for name in buffers),
    )


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _untied(group: Sequence[str], stored: Mapping[str, StoredTensor]) -> list[list[str]]:
    """A tied parameter's names together; those apart that the files have with other numbers, as transformers does."""
    together, apart = [group[0]], []
    for name in group[1:]:
        if name in stored and not _equal(stored[group[0]], stored[name]):
            apart.append([name])
        else:
            together.append(name)
    return [together, *apart]


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors of one shape have the same numbers."""
    number = int(torch.tensor(first.shape).prod())
    for start in range(0, number, _NUM_AT_ONCE):
        pieces = [torch.empty(min(_NUM_AT_ONCE, number - start), dtype=torch.float64) for _ in range(2)]
        for stored, piece in zip((first, second), pieces, strict=True):
            read_part(stored, piece, start)
        if not torch.equal(*pieces):
            return False
    return True


def _agree_on_ties(plan: _Plan) -> None:
    """Raise unless every rank is about to make the same parameters, which later collectives rely on. Collective."""
    everyone = gather_json([list(names) for names, _ in plan.parameters])
    different = [rank for rank, found in enumerate(everyone) if found != everyone[0]]
    if different:
        raise InputError(
            f"ranks {different} find other weights in model.name_or_path than rank 0: give all nodes the same files"
        )


def _load_on_rank_zero(
    config: ModelConfig, folder: Path, model: PreTrainedModel, init: Any, reason: str, head_seed: int | None
) -> PreTrainedModel:
    """Load on rank 0's host, and give every rank its shards from there, one weight at a time. Collective."""
    is_main = dist.get_rank() == 0
    warnings.warn(
        f"{folder} cannot be read in shards ({reason}): rank 0 holds the whole model on its host while it is loaded",
        ShardedLoadingWarning,
        stacklevel=3,
    )
    with failing_together():
        if is_main:
            model = load_model(config, head_seed=head_seed)
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    description = [
        [names, list(parameters[names[0]].shape), str(parameters[names[0]].dtype).removeprefix("torch.")]
        for names in groups.values()
    ]
    owners = _owners(model)
    for names, shape, dtype in gather_json(description if is_main else None)[0]:
        if is_main:
            compat.shards_of_rank_zero(init, parameters[names[0]].requires_grad_(False))
            continue
        # Only what the broadcast writes is ever touched of it.
        parameter = nn.Parameter(
            torch.empty(shape, dtype=getattr(torch, dtype), device=init.local_device), requires_grad=False
        )
        compat.shards_of_rank_zero(init, parameter)
        _put(owners, names, parameter)
    for owner, name, buffer in _buffers(model):
        real = torch.empty_like(buffer, device=init.local_device) if buffer.is_meta else buffer.to(init.local_device)
        dist.broadcast(real, src=0)
        owner._buffers[name] = real
    remember_head(model, gather_json(fresh_head(model))[0])
    return model.eval()
