"""How are the values and the selection stored as an adapter, and put on a base again?

Format 1, a folder: ``adapter.json`` (format, version, placement, digest of the selection, fingerprints of the base's
entries, identity of the base), ``selection.safetensors``, ``values.safetensors`` (1-D, named
``<module>.values_<kind>``), and ``manifest.json`` (size and hash of each).
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sparse_zero.checkpoint.conversion import (
    check_base,
    convert_values,
    fingerprints,
    model_fingerprints,
    originals_by_name,
)
from sparse_zero.checkpoint.folders import check_folder, new_folder
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_json, read_safetensors, write_safetensors
from sparse_zero.layers.entries import gather_entries
from sparse_zero.layers.sparsify import (
    check_fits,
    placement_of,
    selection_of,
    sparse_linears,
    sparsify,
    trainable_parameters,
)
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.config import PLACEMENTS, Placement
from sparse_zero.zero.state import read_masters

FORMAT = "sparse_zero.adapter"
VALUES_FORMAT = "sparse_zero.values"
FORMAT_VERSION = 1


def save_adapter(model_or_engine: Any, folder: str | Path, *, base: BaseIdentity | None = None) -> None:
    """Write values and selection to ``folder``; a few bytes per trained parameter. Collective.

    Args:
        model_or_engine: a sparsified model, or an engine over one: then the fp32 masters are saved.
        folder: replaced atomically by rank 0, if it exists.
        base: identity of the base's files, recorded beside the fingerprints of its entries.
    """
    folder = Path(folder)
    is_engine = not isinstance(model_or_engine, nn.Module) or hasattr(model_or_engine, "optimizer")
    model: nn.Module = model_or_engine.module if is_engine else model_or_engine
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    if is_engine:
        values = read_masters(model_or_engine, keep=is_writer)
    else:
        values = {
            f"{name}.values_{kind}": parameter.detach()
            for name, layer in sparse_linears(model)
            for kind, parameter in layer.values().items()
        }
    selection = selection_of(model)
    if is_writer:
        with new_folder(folder) as temporary:
            selection.save(temporary / "selection.safetensors")
            write_safetensors(temporary / "values.safetensors", values, {"format": VALUES_FORMAT})
            header = {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "placement": placement_of(model),
                "selection_digest": selection.digest(),
                "num_parameters": selection.num_parameters,
                "base": None if base is None else {"name": base.name, "sha256": base.sha256},
                "base_fingerprints": model_fingerprints(model),
            }
            atomic_write_json(temporary / "adapter.json", header)
    if dist.is_initialized():
        dist.barrier()


def _read_header(folder: Path) -> dict[str, Any]:
    """The verified header of an adapter folder."""
    if not folder.is_dir():
        raise InputError(f"no adapter folder {folder}: check the path")
    check_folder(folder, "adapter")
    if not (folder / "adapter.json").is_file():
        raise InputError(f"{folder} is no adapter: it has no adapter.json; name the adapter folder of a run")
    header: dict[str, Any] = read_json(folder / "adapter.json")
    if header.get("format") != FORMAT or header.get("version", 0) > FORMAT_VERSION:
        raise InputError(
            f"{folder} has adapter format {header.get('format')!r} version {header.get('version')}, "
            f"not {FORMAT!r} up to {FORMAT_VERSION}: update sparse-zero"
        )
    return header


def read_adapter_base(folder: str | Path) -> BaseIdentity | None:
    """Identity of the base that an adapter was trained on, as far as it was recorded.

    Raises:
        InputError: not an adapter, damaged, or of a newer version.
    """
    base = _read_header(Path(folder))["base"]
    return None if base is None else BaseIdentity(name=base["name"], sha256=base["sha256"])


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    placement: Placement = "inplace",
    trainable: bool = False,
) -> Selection:
    """Put an adapter on its base, in place.

    Args:
        model: the dense base, unsharded.
        folder: what :func:`save_adapter` wrote.
        placement: where the values shall act; the stored form is converted when it is the other one.
        trainable: whether the values require grad afterwards.

    Returns:
        The adapter's selection.

    Raises:
        InputError: not an adapter, damaged, of a newer version, or of another base; the model is unchanged then.
    """
    folder = Path(folder)
    if placement not in PLACEMENTS:
        raise InputError(f"placement is {placement!r}: choose one of {', '.join(PLACEMENTS)}")
    header = _read_header(folder)
    selection = Selection.load(folder / "selection.safetensors")
    values, _ = read_safetensors(folder / "values.safetensors", VALUES_FORMAT)
    check_fits(model, selection)
    parameters = dict(model.named_parameters())
    found = {
        name: fingerprints({kind: gather_entries(parameters[name], chosen, kind).cpu() for kind in chosen.kinds()})
        for name, chosen in selection.weights.items()
    }
    check_base(header["base_fingerprints"], found, folder)
    sparsify(model, selection, placement)
    converted = convert_values(values, originals_by_name(model), header["placement"], placement)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            parameter.copy_(converted[name])
            parameter.requires_grad_(trainable)
    for _, layer in sparse_linears(model):
        layer.write_back()
    return selection
