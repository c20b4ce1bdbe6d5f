"""How are the values and the selection stored as an adapter?

Format 3, a folder that PEFT reads too (see :func:`sparse_zero.register_peft` and docs/adapters.md): ``adapter.json``
(format, version, placement, digest of the selection, fingerprints of the base's entries, identity of the base),
``selection.safetensors``, ``adapter_model.safetensors`` (the values, 1-D, under PEFT's prefix and
``<module>.values_<kind>``), ``retired.safetensors`` where re-selections dropped entries (see
:mod:`sparse_zero.checkpoint.retired_file`), ``adapter_config.json``, which only PEFT reads, and ``manifest.json`` (size
and hash of each). In formats 1 and 2 the values lay in ``values.safetensors``, without the prefix, and PEFT's file did
not exist; format 1 had no retired entries.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_zero.checkpoint.conversion import model_fingerprints
from sparse_zero.checkpoint.folders import check_folder, new_folder, write_manifest
from sparse_zero.checkpoint.headers import (
    ADAPTER_FORMAT,
    ADAPTER_VERSION,
    AdapterHeader,
    check_fingerprints,
    check_values,
    parse_adapter_header,
    read_header,
)
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.checkpoint.retired_file import FILE_NAME as RETIRED_FILE
from sparse_zero.checkpoint.retired_file import read_retired, write_retired
from sparse_zero.collectives import failing_together, rank_and_world_size
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_safetensors, write_safetensors
from sparse_zero.layers.carriers import carriers, values_name
from sparse_zero.layers.retired import Retired
from sparse_zero.layers.sparsify import placement_of, retired_of, selection_of
from sparse_zero.selection.selection import Selection
from sparse_zero.zero import compat
from sparse_zero.zero.config import Placement
from sparse_zero.zero.shards import whole_values
from sparse_zero.zero.state import read_masters

HEADER, SELECTION, PEFT_CONFIG = "adapter.json", "selection.safetensors", "adapter_config.json"
# The values, under the name that PEFT asks for, and under the one that formats 1 and 2 gave them.
VALUES, OLD_VALUES = "adapter_model.safetensors", "values.safetensors"
# What the values file says of itself: PEFT writes the first.
VALUES_FORMAT, OLD_VALUES_FORMAT = "pt", "sparse_zero.values"
# Of an engine's masters, or of a model's values.
VALUES_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PEFT_TYPE = "SPARSE_ZERO"
# What PEFT puts before the names of a model's modules.
PEFT_PREFIX = "base_model.model."
# Attribute of a model: the layer that holds the adapters which PEFT has put on it. The name lacks the method's prefix
# (sparse_zero_), for PEFT deletes no adapters from modules whose name has it.
PEFT_LAYER = "adapters_of_sparse_zero"
# In the values file: what the values belong to, see :func:`owner_digest`.
OWNER = f"{PEFT_PREFIX}owner_digest"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter in memory; values on the host, in the form of ``placement``."""

    selection: Selection
    placement: Placement
    # By name of the values (``<module>.values_<kind>``): 1-D.
    values: dict[str, Tensor]
    retired: Retired
    # By parameter and kind: hashes of the base's entries under the values.
    base_fingerprints: dict[str, dict[str, str]]
    # Where it was read from; shown in errors.
    source: Path
    base: BaseIdentity | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapter":
        return self  # not to be changed, and a copy of a model has no need of another


def owner_digest(selection: Selection, retired: Retired) -> Tensor:
    """[32] uint8: SHA-256 of what values must come with to mean anything; the same of equal entries only.

    Args:
        selection: whose entries the values are.
        retired: entries beside them, and the placement.
    """
    sha = hashlib.sha256(f"{selection.digest()} {retired.placement}".encode())
    for name in sorted(retired.entries):
        entries = retired.entries[name]
        sha.update(f" {name}".encode())
        sha.update(entries.positions.contiguous().numpy().astype("<i8").tobytes())
        sha.update(entries.numbers.float().contiguous().numpy().astype("<f4").tobytes())
    return torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)


def stored_values(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of the values file."""
    named = {f"{PEFT_PREFIX}{name}": values for name, values in adapter.values.items()}
    return {**named, OWNER: owner_digest(adapter.selection, adapter.retired)}


def peft_task_type(model: nn.Module) -> str | None:
    """What PEFT calls the task of a causal language model, by the name of its class; None for others."""
    name = type(model).__name__
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def peft_config(*, base_model: str | None, task_type: str | None) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Args:
        base_model: hub name of the base, as far as it is known.
        task_type: see :func:`peft_task_type`.
    """
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "peft_type": PEFT_TYPE,
        "revision": None,
        "task_type": task_type,
    }


def write_selection_files(folder: Path, adapter: Adapter) -> None:
    """Write everything of an adapter but its values and what only PEFT reads."""
    adapter.selection.save(folder / SELECTION)
    (folder / RETIRED_FILE).unlink(missing_ok=True)
    write_retired(folder, adapter.retired)
    base = adapter.base
    header = {
        "format": ADAPTER_FORMAT,
        "version": ADAPTER_VERSION,
        "placement": adapter.placement,
        "selection_digest": adapter.selection.digest(),
        "num_parameters": adapter.selection.num_parameters,
        "num_retired": adapter.retired.num_entries,
        "base": None if base is None else {"name": base.name, "sha256": base.sha256},
        "base_fingerprints": adapter.base_fingerprints,
    }
    atomic_write_json(folder / HEADER, header)


def write_adapter_manifest(folder: Path) -> None:
    """Write the manifest of an adapter that others have written a part of; other files there are not listed."""
    files = [folder / name for name in (HEADER, PEFT_CONFIG, RETIRED_FILE, SELECTION, VALUES)]
    write_manifest(folder, [path for path in files if path.is_file()])


def write_adapter(folder: Path, adapter: Adapter, config: Mapping[str, Any]) -> None:
    """Write an adapter to ``folder``, which is replaced atomically if it is one.

    Args:
        folder: of the adapter.
        adapter: values and what belongs to them.
        config: see :func:`peft_config`.
    """
    with new_folder(folder) as temporary:
        write_selection_files(temporary, adapter)
        write_safetensors(temporary / VALUES, stored_values(adapter), {"format": VALUES_FORMAT})
        atomic_write_json(temporary / PEFT_CONFIG, config)


def check_not_wrapped(model_or_engine: Any) -> None:
    """Raise for a ``PeftModel``, or an engine over one: the names of its modules are not those of the base.

    Raises:
        InputError: names the remedy.
    """
    model = getattr(model_or_engine, "module", model_or_engine)
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        raise InputError(
            "this is a PeftModel: save with its own save_pretrained, load with its load_adapter, or pass "
            "model.get_base_model()"
        )


def take_adapter(
    model_or_engine: Any, *, base: BaseIdentity | None = None, masters: dict[str, Tensor] | None = None
) -> tuple[Adapter, dict[str, Any]] | None:
    """What :func:`write_adapter` writes of a model, on the host of rank 0; None on others. Collective.

    Args:
        model_or_engine: see :func:`save_adapter`.
        base: identity of the base's files.
        masters: the engine's, by name, where rank 0 has them already; given on all ranks or on none.
    """
    check_not_wrapped(model_or_engine)
    is_engine = not isinstance(model_or_engine, nn.Module) or hasattr(model_or_engine, "optimizer")
    model: nn.Module = model_or_engine.module if is_engine else model_or_engine
    is_writer = rank_and_world_size()[0] == 0
    if masters is not None:
        values = masters
    else:
        values = read_masters(model_or_engine, keep=is_writer) if is_engine else _host_values(model, keep=is_writer)
    with failing_together():
        if not is_writer:
            return None
        adapter = Adapter(
            selection=selection_of(model),
            placement=placement_of(model),
            values=values,
            retired=retired_of(model),
            base_fingerprints=model_fingerprints(model),
            source=Path("the adapter of a model"),
            base=base,
        )
        return adapter, peft_config(base_model=None if base is None else base.name, task_type=peft_task_type(model))


def save_adapter(model_or_engine: Any, folder: str | Path, *, base: BaseIdentity | None = None) -> None:
    """Write values, selection and retired entries to ``folder``; a few bytes for each of them. Collective.

    Args:
        model_or_engine: a sparsified model, or an engine over one: then the fp32 masters are saved.
        folder: replaced atomically by rank 0, if it exists.
        base: identity of the base's files, recorded beside the fingerprints of its entries.

    Raises:
        InputError: the model has no values or is a ``PeftModel``, or ``folder`` holds what is no adapter.
        OSError: the folder cannot be written.
        PeerError: on the other ranks, where writing failed on rank 0.
    """
    taken = take_adapter(model_or_engine, base=base)
    with failing_together():
        if taken is not None:
            write_adapter(Path(folder), *taken)


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


def _read_header(folder: Path) -> AdapterHeader:
    """The verified header of an adapter folder, whose files are checked too."""
    if not folder.is_dir():
        raise InputError(f"no adapter folder {folder}: check the path")
    files = check_folder(folder, "adapter", reads=(HEADER, SELECTION, VALUES, OLD_VALUES, RETIRED_FILE))
    for name in (HEADER, SELECTION):
        if name not in files:
            raise InputError(f"{folder} is no adapter: it has no {name}; name the adapter folder of a run")
    header = parse_adapter_header(read_header(folder / HEADER), folder)
    values = VALUES if header.version >= 3 else OLD_VALUES
    if values not in files:
        raise InputError(f"{folder} is no adapter: it has no {values}; name the adapter folder of a run")
    return header


def read_adapter_base(folder: str | Path) -> BaseIdentity | None:
    """Identity of the base that an adapter was trained on, as far as it was recorded.

    Raises:
        InputError: not an adapter, damaged, or of a newer version.
    """
    return _read_header(Path(folder)).base


def without_owner(tensors: Mapping[str, Tensor], owners: Mapping[str, Tensor], source: Path) -> tuple[str, Any]:
    """Which of several owners the tensors of a values file belong to, and the values by their own names.

    Args:
        tensors: as :func:`stored_values` makes them.
        owners: by any name, digests of :func:`owner_digest`.
        source: for errors.

    Raises:
        InputError: they belong to none of them, or have other names.
    """
    named = dict(tensors)
    digest = named.pop(OWNER, torch.empty(0, dtype=torch.uint8)).cpu()
    owner = next((name for name, wanted in owners.items() if torch.equal(wanted, digest)), None)
    if owner is None:
        raise InputError(f"{source} has values of another selection, placement or retired entries: copy it again")
    for name in named:
        if not name.startswith(PEFT_PREFIX):
            raise InputError(f"{source} has {name[:60]!r}, which is no name of values: use another copy")
    return owner, {name.removeprefix(PEFT_PREFIX): values for name, values in named.items()}


def read_adapter(folder: str | Path) -> Adapter:
    """Read and verify what :func:`save_adapter` wrote.

    Raises:
        InputError: not an adapter, damaged, or of a newer version.
    """
    folder = Path(folder)
    header = _read_header(folder)
    selection = Selection.load(folder / SELECTION)
    if (selection.digest(), selection.num_parameters) != (header.selection_digest, header.num_parameters):
        raise InputError(f"{folder / SELECTION} is not the selection that {HEADER} names: copy the folder again")
    retired = read_retired(folder, header.placement)
    if retired.num_entries != header.num_retired:
        raise InputError(
            f"{folder} has {retired.num_entries:,} retired entries, and {HEADER} names {header.num_retired:,}: "
            "copy the folder again"
        )
    if header.version >= 3:
        path = folder / VALUES
        tensors, _ = read_safetensors(path, VALUES_FORMAT)
        _, values = without_owner(tensors, {"selection": owner_digest(selection, retired)}, path)
    else:
        path = folder / OLD_VALUES
        values, _ = read_safetensors(path, OLD_VALUES_FORMAT)
    check_values(values, selection, path, dtypes=VALUES_DTYPES)
    check_fingerprints(header.base_fingerprints, selection, retired, folder / HEADER)
    return Adapter(
        selection=selection,
        placement=header.placement,
        values=values,
        retired=retired,
        base_fingerprints=header.base_fingerprints,
        source=folder,
        base=header.base,
    )
