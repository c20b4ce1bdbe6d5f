"""What the spawned ranks do in the tests of loading and saving in shards."""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from models.gather import gather_json
from models.loading import ModelConfig, load_model
from models.sharded_loading import ShardedLoadingWarning, load_sharded, read_part
from models.sharded_saving import ShardedSavingWarning, save_sharded
from models.weight_files import StoredTensor
from sparse_zero.collectives import PeerError
from sparse_zero.errors import InputError
from sparse_zero.memory.measure import PeakMemory
from sparse_zero.zero.compat import MODULE_ATTRIBUTES
from sparse_zero.zero.inference import sharded_forward

STAGE3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 50},
    "steps_per_print": 2**31 - 1,
}
TOKENS = torch.arange(3, 33).view(3, 10)


def stage3(model: ModelConfig, **zero: Any) -> dict[str, Any]:
    """DeepSpeed's config for a model."""
    precision = {"bf16": {"enabled": model.dtype == "bfloat16"}}
    return {**STAGE3, **precision, "zero_optimization": {**STAGE3["zero_optimization"], **zero}}


def load_counting(model: ModelConfig, settings: dict[str, Any]) -> tuple[Any, int, list[str]]:
    """The sharded model, the numbers that this rank has read, and what was warned of."""
    number = 0

    def counting(stored: StoredTensor, out: Tensor, start: int) -> None:
        nonlocal number
        number += len(out)
        assert math.prod(stored.shape) >= start + len(out)
        read_part(stored, out, start)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ShardedLoadingWarning)
        sharded = load_sharded(model, settings, read=counting)
    return sharded, number, [str(each.message) for each in caught if each.category is ShardedLoadingWarning]


def tied_names(model: nn.Module) -> set[tuple[str, ...]]:
    """Names of one parameter together."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {tuple(sorted(names)) for names in groups.values()}


def check_shards(sharded: Any, plain: Any) -> int:
    """Assert that every shard is this rank's slice of the plain model, bit for bit; returns the numbers in them."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert tied_names(sharded) == tied_names(plain)
    assert type(sharded) is type(plain)
    assert not sharded.training
    wanted, total = dict(plain.named_parameters()), 0
    for name, parameter in sharded.named_parameters():
        whole = wanted.pop(name).detach().flatten()
        shard = parameter.ds_tensor
        size = -(-len(whole) // world_size)
        own = whole[rank * size : (rank + 1) * size]
        assert parameter.numel() == 0, name
        assert not parameter.requires_grad, name
        assert (parameter.dtype, shard.dtype) == (whole.dtype, whole.dtype), name
        assert len(shard) == size, name
        assert torch.equal(shard[: len(own)], own), name
        assert not shard[len(own) :].any(), name
        total += len(own)
    assert not wanted
    buffers = dict(plain.named_buffers())
    for name, buffer in sharded.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers.pop(name)), name
    assert not buffers
    assert sharded.generation_config.to_dict() == plain.generation_config.to_dict()
    assert sharded.config.to_dict() == plain.config.to_dict()
    return total


def check_forward(sharded: Any, plain: Any, settings: dict[str, Any], times: int) -> None:
    """Assert that the sharded model predicts what the plain one does, and is as it was afterwards."""
    for _ in range(times):
        with sharded_forward(sharded, settings), torch.no_grad():
            found = sharded(input_ids=TOKENS).logits
        with torch.no_grad():
            wanted = plain(input_ids=TOKENS).logits
        tolerance = 2e-2 if plain.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        for module in sharded.modules():
            assert not module._forward_hooks, module
            assert not module._forward_pre_hooks, module
            assert not set(MODULE_ATTRIBUTES) & set(vars(module)), module
        assert all(parameter.numel() == 0 for parameter in sharded.parameters())


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder, by name."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def check_saved(sharded: Any, plain: Any, folder: Path, max_file_bytes: int) -> tuple[int, list[str]]:
    """Assert that what is saved is what transformers saves of the plain model; number of files, and warnings."""
    mine, theirs = folder / "mine", folder / "theirs"
    if dist.get_rank() == 0:
        mine.mkdir(parents=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ShardedSavingWarning)
        save_sharded(sharded, mine if dist.get_rank() == 0 else None, max_file_bytes=max_file_bytes)
    said = [str(each.message) for each in caught if each.category is ShardedSavingWarning]
    dist.barrier()
    if dist.get_rank() != 0:
        return 0, said
    plain.save_pretrained(theirs)
    found, wanted = read_folder(mine), read_folder(theirs)
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    files = sorted(mine.glob("*.safetensors"))
    for name in ("config.json", "generation_config.json"):
        assert (mine / name).exists() == (theirs / name).exists()
        assert not (mine / name).exists() or (mine / name).read_text() == (theirs / name).read_text()
    if len(files) == 1:
        assert files[0].read_bytes() == (theirs / files[0].name).read_bytes()
    else:
        plain.save_pretrained(folder / "cut", max_shard_size=max_file_bytes)
        index = "model.safetensors.index.json"
        found_index, wanted_index = (json.loads((each / index).read_text()) for each in (mine, folder / "cut"))
        assert found_index["metadata"] == wanted_index["metadata"]
        assert found_index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
        assert all(path.stat().st_size < max_file_bytes + 10_000 for path in files)
    return len(files), said


def cases(folders: Mapping[str, Mapping[str, Any]], out: str) -> dict[str, Any]:
    """Load, run and save every model in shards; what each case read and warned of, per rank.

    Args:
        folders: of each case its ModelConfig's settings, and of ``zero`` DeepSpeed's.
        out: a folder for what is saved.
    """
    found: dict[str, Any] = {}
    for case, given in folders.items():
        settings = dict(given)
        zero, max_file_bytes = settings.pop("zero", {}), settings.pop("max_file_bytes", 10**9)
        model = ModelConfig(**settings)
        plain = load_model(model)
        sharded, number, said = load_counting(model, stage3(model, **zero))
        own = check_shards(sharded, plain)
        if not said and "zero_hpz_partition_size" not in zero:
            stored = sum(buffer.numel() for name, buffer in plain.named_buffers() if name in plain.state_dict())
            assert number == own + stored, (case, number, own)
        # Twice: an engine leaves nothing that the next one would meet.
        check_forward(sharded, plain, stage3(model, **zero), times=1 if found else 2)
        files, saving = check_saved(sharded, plain, Path(out) / case, max_file_bytes)
        found[case] = {"said": said, "files": files, "saving": saving}
    return found


def errors(folders: Mapping[str, str], broken_on_last: str) -> dict[str, list[list[str]]]:
    """What every rank raises for folders that cannot be used, and where the last rank alone cannot read."""
    found = {}
    for case, folder in folders.items():
        try:
            load_sharded(ModelConfig(name_or_path=folder), STAGE3)
        except (InputError, PeerError) as error:
            found[case] = gather_json([type(error).__name__, str(error)])

    def failing(stored: StoredTensor, out: Tensor, start: int) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            stored = StoredTensor(path=stored.path, offset=10**12, dtype=stored.dtype, shape=stored.shape)
        read_part(stored, out, start)

    try:
        load_sharded(ModelConfig(name_or_path=broken_on_last), STAGE3, read=failing)
    except (InputError, PeerError) as error:
        found["one rank"] = gather_json([type(error).__name__, str(error)])
    return found


def peaks(folder: str, out: str, *, sharded: bool) -> list[dict[str, float]]:
    """By rank, the largest memory beyond that before, in bytes, of loading a model, and then of saving it."""
    config, memory = ModelConfig(name_or_path=folder), PeakMemory("cpu")
    # What is imported and built once is no part of a model.
    load_sharded(ModelConfig(name_or_path=str(Path(folder) / "small")), stage3(config))
    before = memory.current_bytes() or 0
    assert memory.reset()
    model: Any = load_sharded(config, stage3(config)) if sharded else load_model(config)
    if not sharded:
        for parameter in model.parameters():  # They are mapped from the files, and read when they are used.
            parameter.sum()
    loading = memory.peak_bytes() - before
    held = memory.current_bytes() or 0
    memory.reset()
    if sharded:
        if dist.get_rank() == 0:
            Path(out).mkdir()
        save_sharded(model, Path(out) if dist.get_rank() == 0 else None, max_file_bytes=20_000_000)
    result = {"loading": loading, "saving": memory.peak_bytes() - held, "held": held - before}
    memory.close()
    return gather_json(result)
