"""How are the values and the selection stored as an adapter?

Format 2, a folder: ``adapter.json`` (format, version, placement, digest of the selection, fingerprints of the base's
entries, identity of the base), ``selection.safetensors``, ``values.safetensors`` (1-D, named
``<module>.values_<kind>``), ``retired.safetensors`` where re-selections dropped entries (see
:mod:`sparse_zero.checkpoint.retired_file`), and ``manifest.json`` (size and hash of each). Format 1 had none dropped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_zero.checkpoint.conversion import model_fingerprints
from sparse_zero.checkpoint.folders import check_folder, new_folder
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.checkpoint.retired_file import read_retired, write_retired
from sparse_zero.collectives import failing_together, rank_and_world_size
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_json, read_safetensors, write_safetensors
from sparse_zero.layers.carriers import carriers, values_name
from sparse_zero.layers.retired import Retired
from sparse_zero.layers.sparsify import placement_of, retired_of, selection_of
from sparse_zero.selection.selection import Selection
from sparse_zero.zero import compat
from sparse_zero.zero.config import Placement
from sparse_zero.zero.shards import whole_values
from sparse_zero.zero.state import read_masters

FORMAT = "sparse_zero.adapter"
VALUES_FORMAT = "sparse_zero.values"
FORMAT_VERSION = 2


def save_adapter(model_or_engine: Any, folder: str | Path, *, base: BaseIdentity | None = None) -> None:
    """Write values, selection and retired entries to ``folder``; a few bytes for each of them. Collective.

    Args:
        model_or_engine: a sparsified model, or an engine over one: then the fp32 masters are saved.
        folder: replaced atomically by rank 0, if it exists.
        base: identity of the base's files, recorded beside the fingerprints of its entries.
    """
    folder = Path(folder)
    is_engine = not isinstance(model_or_engine, nn.Module) or hasattr(model_or_engine, "optimizer")
    model: nn.Module = model_or_engine.module if is_engine else model_or_engine
    is_writer = rank_and_world_size()[0] == 0
    values = read_masters(model_or_engine, keep=is_writer) if is_engine else _host_values(model, keep=is_writer)
    selection, retired = selection_of(model), retired_of(model)
    with failing_together():
        if not is_writer:
            return
        with new_folder(folder) as temporary:
            selection.save(temporary / "selection.safetensors")
            write_safetensors(temporary / "values.safetensors", values, {"format": VALUES_FORMAT})
            write_retired(temporary, retired)
            header = {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "placement": placement_of(model),
                "selection_digest": selection.digest(),
                "num_parameters": selection.num_parameters,
                "num_retired": retired.num_entries,
                "base": None if base is None else {"name": base.name, "sha256": base.sha256},
                "base_fingerprints": model_fingerprints(model),
            }
            atomic_write_json(temporary / "adapter.json", header)


def _host_values(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """All values, whole, on the host; empty ones where they are not kept. Collective where they are sharded."""
    parameters = {
        values_name(name, kind): parameter
        for name, carrier in carriers(model)
        for kind, parameter in carrier.values().items()
    }
    if any(compat.is_sharded(parameter) for parameter in parameters.values()):
        compat.end_gathers(model)
    return {
        name: values.to("cpu", copy=True) if keep else torch.empty(0)
        for name, values in zip(parameters, whole_values(parameters.values()), strict=True)
    }


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


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A verified adapter in memory; values on the host, in the form of ``placement``."""

    selection: Selection
    placement: Placement
    # By name of the values (``<module>.values_<kind>``): 1-D.
    values: dict[str, Tensor]
    retired: Retired
    # By parameter and kind: hashes of the base's entries under the values.
    base_fingerprints: dict[str, dict[str, str]]
    source: Path


def read_adapter(folder: str | Path) -> Adapter:
    """Read and verify what :func:`save_adapter` wrote.

    Raises:
        InputError: not an adapter, damaged, or of a newer version.
    """
    folder = Path(folder)
    header = _read_header(folder)
    values, _ = read_safetensors(folder / "values.safetensors", VALUES_FORMAT)
    return Adapter(
        selection=Selection.load(folder / "selection.safetensors"),
        placement=header["placement"],
        values=values,
        retired=read_retired(folder, header["placement"]),
        base_fingerprints=header["base_fingerprints"],
        source=folder,
    )
