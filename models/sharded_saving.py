"""How is a model in shards written as a plain folder, without any rank ever holding all of it?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.compat import saved_names, unsaved_names
from models.gather import gather_json
from sparse_zero.collectives import failing_together, rank_and_world_size
from sparse_zero.files import atomic_write_json
from sparse_zero.module_map import parameter_shape
from sparse_zero.zero import compat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of one file: what rank 0 holds on its host at once.
MAX_FILE_BYTES = 10**9
FILE_NAMES = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"


class ShardedSavingWarning(UserWarning):
    """The model is in shards, but rank 0 holds all of it while it is saved; the message says why."""


def save_sharded(model: PreTrainedModel, folder: Path | None, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Write what ``model.save_pretrained`` writes, of a model whose weights ZeRO-3 holds in shards. Collective.

    One weight after the other is gathered; rank 0 keeps those of one file, and writes it. Models that transformers
    saves in another form than it holds them in (experts) are put together on rank 0's host, which is said.

    Args:
        model: plain, in shards or not.
        folder: exists, on rank 0; not read on the others.
        max_file_bytes: of one file; a larger weight has a file of its own.
    """
    is_main = rank_and_world_size()[0] == 0
    tensors = _to_save(model)
    described = {
        name: torch.empty(parameter_shape(each), dtype=each.dtype, device="meta") for name, each in tensors.items()
    }
    names: dict[str, str] | None = None
    files: dict[str, list[str]] = {}
    index: dict[str, object] | None = None
    with failing_together():
        if is_main:
            assert folder is not None
            names = saved_names(model, described)
            if names is not None:
                # Everything but the weights: configuration, generation settings, code that comes with the model.
                model.save_pretrained(folder, state_dict={})
                sizes = {name: described[own] for name, own in names.items()}
                files, index = _files(sizes, max_file_bytes, sum(map(compat.full_numel, model.parameters())))
    names, files = gather_json([names, files])[0]
    if names is None:
        _save_whole(model, folder, tensors)
        return
    for file, members in files.items():
        held = {name: each for name in members if (each := _on_rank_zero(tensors[names[name]])) is not None}
        with failing_together():
            if is_main:
                from safetensors.torch import save_file

                assert folder is not None
                save_file(held, folder / file, metadata={"format": "pt"})
        del held
    with failing_together():
        if is_main and index is not None:
            assert folder is not None
            atomic_write_json(folder / INDEX, index)


def _to_save(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the name that each is saved under; what is tied once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    everything = {
        name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in unsaved_names(model)
    }
    chosen: dict[int, str] = {}
    for name, tensor in everything.items():
        # Of names for one parameter, the one that the others are tied to; in the order of the model.
        if id(tensor) not in chosen or (chosen[id(tensor)] in tied and name not in tied):
            chosen[id(tensor)] = name
    return {name: tensor for name, tensor in everything.items() if chosen[id(tensor)] == name}


def _files(
    described: Mapping[str, Tensor], max_file_bytes: int, num_parameters: int
) -> tuple[dict[str, list[str]], dict[str, object] | None]:
    """The tensors of each file, and the index of more than one."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        dict(described), filename_pattern=FILE_NAMES, max_shard_size=max_file_bytes
    )
    if not split.is_sharded:
        return split.filename_to_tensors, None
    metadata = {"total_parameters": num_parameters, **split.metadata}
    return split.filename_to_tensors, {"metadata": metadata, "weight_map": split.tensor_to_filename}


def _on_rank_zero(tensor: Tensor) -> Tensor | None:
    """The whole tensor on rank 0's host; None on the others. Collective."""
    if compat.is_sharded(tensor):
        return compat.on_rank_zero(tensor)
    return tensor.detach().cpu().contiguous() if rank_and_world_size()[0] == 0 else None


def _save_whole(model: PreTrainedModel, folder: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Put the model together on rank 0's host, and let transformers save it. Collective."""
    warnings.warn(
        f"a {model.config.model_type} model is saved in another form than it is held in: rank 0 holds the whole model "
        "on its host while it is saved",
        ShardedSavingWarning,
        stacklevel=3,
    )
    state = {name: held for name, tensor in tensors.items() if (held := _on_rank_zero(tensor)) is not None}
    with failing_together():
        if folder is not None and state:
            model.save_pretrained(folder, state_dict=state)
