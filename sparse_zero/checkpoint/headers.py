"""What may stand in the JSON of checkpoints, adapters and their manifests, and do the tensors fit to it?

These files may come from anywhere: from another program, a disk that has failed, or somebody who means harm. Every
field has a type and a range here, none may be missing and none may be added, names of files stay in their folder, and
tensors have exactly the names, dtypes and lengths that the selection asks for. What does not hold raises
:class:`~sparse_zero.errors.InputError`, before anything of the size that it names is allocated.

Files that a manifest does not list are not read; they may lie beside the others (a model card, say), unless they have
the name of one that would be read.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from torch import Tensor

from sparse_zero.checkpoint.conversion import RETIRED
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.credentials import without_credentials
from sparse_zero.errors import InputError
from sparse_zero.fields import MAX_WHOLE, FieldError, Fields, is_whole, shown
from sparse_zero.files import parse_json, read_json, to_json
from sparse_zero.layers.carriers import split_weight_name
from sparse_zero.layers.retired import Retired
from sparse_zero.module_map import VALUES_PREFIX, Matrix
from sparse_zero.selection.config import KINDS, Kind
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.config import PLACEMENTS, Placement

CHECKPOINT_FORMAT, CHECKPOINT_VERSION = "sparse_zero.checkpoint", 4
ADAPTER_FORMAT, ADAPTER_VERSION = "sparse_zero.adapter", 3
# Of the header of a checkpoint or an adapter, and of a manifest. A fingerprint takes some 100 bytes for each weight and
# kind, of which the largest mixtures of experts have ten thousand.
MAX_HEADER_BYTES = 64 * 2**20
# Bytes of one part of a file name, and of the whole: what file systems take.
_MAX_PART_BYTES, _MAX_NAME_BYTES = 255, 4096

# What checkpoints were written of that do not name their optimizer (format 2 and before).
_OPTIMIZERS_OF_FORMAT_2: tuple[str, ...] = ("adamw", "adam")
# Numbers of a dynamic loss scaler, and the smallest that each can be.
_LOSS_SCALE = {"cur_scale": 2.0**-126, "cur_iter": 0, "last_overflow_iter": -MAX_WHOLE, "cur_hysteresis": -MAX_WHOLE}
_LARGEST = 2.0**127
# Names of optimizers and of their states.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,99}")


@contextmanager
def _refusing() -> Iterator[None]:
    """Tell a reader of a copied folder what to do about a field that is wrong."""
    try:
        yield
    except FieldError as error:
        raise InputError(
            f"{error}: it is damaged, or of a newer version; use another copy, or update sparse-zero"
        ) from error


def _version(fields: Fields, folder: Path, what: str, wanted: str, newest: int) -> int:
    """The version, after the format; others' files and newer ones are refused by name."""
    found, version = fields.anything("format"), fields.anything("version")
    if found != wanted or not is_whole(version, 1, newest):
        raise InputError(
            f"{folder} has {what} format {shown(found)} version {shown(version)}, not {wanted!r} up to {newest}: "
            "update sparse-zero"
        )
    return cast(int, version)


def _base(fields: Fields, where: str) -> BaseIdentity | None:
    value = fields.mapping_or_none("base")
    if value is None:
        return None
    base = Fields(value, f"the base in {where}")
    identity = BaseIdentity(name=base.text("name"), sha256=base.sha256("sha256"))
    base.end()
    return identity


def _fingerprints(fields: Fields, where: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name, entry in fields.mapping("base_fingerprints").items():
        of_weight = Fields(entry, f"the fingerprint of {shown(name)} in {where}")
        present = [kind for kind in (*KINDS, RETIRED) if kind in entry]
        found[name] = {kind: of_weight.sha256(kind) for kind in present}
        of_weight.end()
    return found


def _placement(fields: Fields) -> Placement:
    return cast(Placement, fields.choice("placement", PLACEMENTS))


@dataclass(frozen=True, kw_only=True)
class RandomStreams:
    """Whose random states a checkpoint has."""

    num_ranks: int
    names: tuple[str, ...]


def _random_streams(fields: Fields, where: str) -> RandomStreams | None:
    value = fields.mapping_or_none("rng")
    if value is None:
        return None
    rng = Fields(value, f"the random streams in {where}")
    found = RandomStreams(num_ranks=rng.whole("ranks", 1), names=tuple(rng.texts("streams", _NAME, "names of streams")))
    rng.end()
    return found


@dataclass(frozen=True, kw_only=True)
class CheckpointHeader:
    """``checkpoint.json``, of any format that is read; None where an older format did not record it."""

    version: int
    # Steps that the optimizer had taken.
    optimizer_step: int
    # What the optimizer computes; several where it was not recorded.
    optimizers: tuple[str, ...]
    # Names of what it keeps for each entry.
    optimizer_states: tuple[str, ...] | None
    loss_scale: dict[str, float] | None
    placement: Placement
    base: BaseIdentity | None
    base_fingerprints: dict[str, dict[str, str]]
    # What the caller of save_checkpoint added.
    extra: dict[str, Any]
    # From format 4 on: of the selection beside it, of the checkpoint (see sealed), the run's config, which random
    # streams of how many ranks there are, and the state of the engine's learning rate scheduler.
    selection_digest: str | None = None
    state_id: str | None = None
    config: dict[str, Any] | None = None
    rng: RandomStreams | None = None
    schedule: dict[str, Any] | None = None


@_refusing()
def parse_checkpoint_header(content: object, folder: Path) -> CheckpointHeader:
    """The checked header of a checkpoint.

    Args:
        content: of ``checkpoint.json``, as :func:`sparse_zero.files.read_json` gives it.
        folder: of the checkpoint, for errors.

    Raises:
        InputError: names the field that is missing, unknown, or not what it must be.
    """
    where = str(folder / "checkpoint.json")
    fields = Fields(content, where)
    version = _version(fields, folder, "checkpoint", CHECKPOINT_FORMAT, CHECKPOINT_VERSION)
    optimizers, states = _OPTIMIZERS_OF_FORMAT_2, None
    if version >= 3:
        optimizer = Fields(fields.mapping("optimizer"), f"the optimizer in {where}")
        optimizers = (optimizer.text("name", _NAME, "the name of an optimizer"),)
        states = optimizer.texts("states", _NAME, "names of states")
        if sorted(set(states)) != states:
            optimizer.refuse("states", states, "each name once, sorted")
        optimizer.end()
    # Format 3 without a scaler has null; the formats before may lack the field.
    loss_scale = None
    if version >= 3 or fields.has("loss_scale"):
        loss_scale = fields.mapping_or_none("loss_scale")
    if loss_scale is not None:
        scale = Fields(loss_scale, f"the loss scale in {where}")
        loss_scale = {name: scale.number(name, low, _LARGEST) for name, low in _LOSS_SCALE.items()}
        scale.end()
    if version >= 4:
        fields.sha256("masters_sha256")
        if fields.sha256("state_id") != _state_id(cast(dict[str, Any], content)):
            raise FieldError(f"{where} does not match its own state_id")
    header = CheckpointHeader(
        version=version,
        optimizer_step=fields.whole("optimizer_step"),
        optimizers=optimizers,
        optimizer_states=None if states is None else tuple(states),
        loss_scale=loss_scale,
        placement=_placement(fields),
        base=_base(fields, where),
        base_fingerprints=_fingerprints(fields, where),
        extra=fields.mapping("extra"),
        selection_digest=fields.sha256("selection_digest") if version >= 4 else None,
        state_id=cast(dict[str, Any], content)["state_id"] if version >= 4 else None,
        config=fields.mapping_or_none("config") if version >= 4 else None,
        rng=_random_streams(fields, where) if version >= 4 else None,
        schedule=fields.mapping_or_none("schedule") if version >= 4 else None,
    )
    fields.end()
    return header


@dataclass(frozen=True, kw_only=True)
class AdapterHeader:
    """``adapter.json``, of any format that is read."""

    version: int
    placement: Placement
    selection_digest: str
    num_parameters: int
    num_retired: int
    base: BaseIdentity | None
    base_fingerprints: dict[str, dict[str, str]]


@_refusing()
def parse_adapter_header(content: object, folder: Path) -> AdapterHeader:
    """The checked header of an adapter; like :func:`parse_checkpoint_header`.

    Raises:
        InputError: names the field that is missing, unknown, or not what it must be.
    """
    where = str(folder / "adapter.json")
    fields = Fields(content, where)
    version = _version(fields, folder, "adapter", ADAPTER_FORMAT, ADAPTER_VERSION)
    header = AdapterHeader(
        version=version,
        placement=_placement(fields),
        selection_digest=fields.sha256("selection_digest"),
        num_parameters=fields.whole("num_parameters", 1),
        num_retired=fields.whole("num_retired") if version >= 2 else 0,
        base=_base(fields, where),
        base_fingerprints=_fingerprints(fields, where),
    )
    fields.end()
    return header


@dataclass(frozen=True, kw_only=True)
class ManifestEntry:
    """Size and content of one file."""

    num_bytes: int
    sha256: str


@_refusing()
def parse_manifest(content: object, path: Path) -> dict[str, ManifestEntry]:
    """The checked content of a manifest: by name of the file, which does not leave the folder.

    Raises:
        InputError: names the entry that is not what it must be.
    """
    fields = Fields(content, str(path))
    files = fields.mapping("files")
    fields.end()
    found = {}
    for name, content_of in files.items():
        check_name(name, path)
        entry = Fields(content_of, f"{path}, file {shown(name)},")
        found[name] = ManifestEntry(num_bytes=entry.whole("bytes"), sha256=entry.sha256("sha256"))
        entry.end()
    return found


def check_name(name: str, source: Path) -> None:
    """Raise unless ``name`` is a relative path of forward slashes that goes downwards only.

    Raises:
        InputError: names it, and ``source``, where it stands.
    """
    parts = name.split("/")
    is_plain = all(part not in ("", ".", "..") and len(part.encode()) <= _MAX_PART_BYTES for part in parts)
    if (
        not is_plain
        or len(name.encode()) > _MAX_NAME_BYTES
        or "\\" in name
        or not name.isprintable()
        # A drive or a stream of Windows.
        or ":" in name
    ):
        raise InputError(
            f"{source} names the file {shown(name)}, which may lie outside of the folder: use another copy"
        )


def path_inside(folder: Path, name: str) -> Path:
    """Where the file ``name`` of ``folder`` is, if neither its name nor a symbolic link leads out of the folder.

    The cache of the Hugging Face hub keeps the files of ``snapshots/<commit>`` as links to ``blobs`` two levels above:
    these are followed.

    Raises:
        InputError: it leads out.
    """
    check_name(name, folder)
    try:
        real, path = folder.resolve(), folder / PurePosixPath(name)
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # A circle of links.
        raise InputError(f"{folder / name} cannot be followed ({error}): copy the folder again") from error
    snapshot = next((each for each in (real, *real.parents) if each.parent.name == "snapshots"), None)
    is_blob = snapshot is not None and target.parent == snapshot.parent.parent / "blobs"
    if not target.is_relative_to(real) and not is_blob:
        raise InputError(
            f"{path} is a link that leads out of its folder, to {shown(str(target))}: put the file itself there"
        )
    return path


def read_header(path: Path) -> Any:
    """The JSON of a header, bounded in size and depth, without infinities and NaN.

    Raises:
        InputError: see :func:`sparse_zero.files.read_json`.
    """
    return read_json(path, max_bytes=MAX_HEADER_BYTES, strict=True)


# --- do tensors fit to the selection? ---------------------------------------------------------------------------------


def _by_parameter(selection: Selection) -> dict[str, dict[Kind, int]]:
    """Values of each parameter and kind, over all matrices of a stack."""
    found: dict[str, dict[Kind, int]] = {}
    for weight, chosen in selection.weights.items():
        of_parameter = found.setdefault(split_weight_name(weight)[0], {})
        for kind, number in chosen.num_parameters_by_kind().items():
            if number:
                of_parameter[kind] = of_parameter.get(kind, 0) + number
    return found


def check_fingerprints(
    fingerprints: Mapping[str, Mapping[str, str]], selection: Selection, retired: Retired, source: Path
) -> None:
    """Raise unless there is a fingerprint for every weight and kind that has values, or retired entries, and no other.

    Raises:
        InputError: names the first that is missing or too many.
    """
    wanted: dict[str, set[str]] = {name: set(kinds) for name, kinds in _by_parameter(selection).items()}
    for name in retired.entries:
        wanted.setdefault(name, set()).add(RETIRED)
    for name in sorted({*wanted, *fingerprints}):
        kinds, found = wanted.get(name, set()), set(fingerprints.get(name, ()))
        if kinds != found:
            raise InputError(
                f"{source} has fingerprints of the base for {sorted(found)} of {shown(name)}, and its selection and "
                f"retired entries ask for {sorted(kinds)}: use another copy"
            )


def _name_of(parameter: str, kind: Kind, *, is_swapped: bool) -> str:
    """What the values of a parameter are called: where its linear was swapped, or its owner hooked."""
    module, dot, attribute = parameter.rpartition(".")
    return (
        f"{module}{dot}{VALUES_PREFIX}{kind}"
        if is_swapped
        else f"{module}{dot}sparse_{attribute}.{VALUES_PREFIX}{kind}"
    )


def names_on(matrices: Mapping[str, Matrix], selection: Selection) -> list[str]:
    """What the values of a selection are called in a model.

    Args:
        matrices: of the model, by parameter.
        selection: which entries.
    """
    return [
        _name_of(parameter, kind, is_swapped=parameter in matrices and matrices[parameter].is_linear)
        for parameter, kinds in _by_parameter(selection).items()
        for kind in kinds
    ]


def check_names(stored: Collection[str], wanted: Collection[str], source: object) -> None:
    """Raise unless values that :func:`check_values` has passed are called as those of the model.

    Args:
        stored: their names.
        wanted: names of the model's.
        source: of the values, for errors.

    Raises:
        InputError: a parameter is held in another way than where they were trained: tied there, say, and not here.
    """
    missing = sorted(set(wanted) - set(stored))
    if missing:
        raise InputError(
            f"{source} has no values {missing[0]}: the parameter was held in another way (tied, say) where they were "
            "trained; load the base that they belong to"
        )


def check_values(
    tensors: Mapping[str, Tensor], selection: Selection, source: Path, *, dtypes: Collection[torch.dtype]
) -> None:
    """Raise unless ``tensors`` are the values of ``selection``, each 1-D, of its length and one of the dtypes.

    The values of a parameter ``m.weight`` are called ``m.values_<kind>`` where a linear was swapped, else
    ``m.sparse_weight.values_<kind>``.

    Raises:
        InputError: names the first that is missing, too many, or of another form.
    """
    left = dict(tensors)
    for parameter, kinds in _by_parameter(selection).items():
        swapped = [_name_of(parameter, kind, is_swapped=True) for kind in kinds]
        is_swapped = parameter.rpartition(".")[2] == "weight" and any(name in left for name in swapped)
        for kind, number in kinds.items():
            name = _name_of(parameter, kind, is_swapped=is_swapped)
            if name not in left:
                raise InputError(f"{source} has no values {name}, which its selection asks for: use another copy")
            _check_flat(left.pop(name), name, number, source, dtypes)
    if left:
        raise InputError(f"{source} has {shown(next(iter(left)))}, which its selection does not have: use another copy")


def _check_flat(found: Tensor, name: str, number: int, source: Path, dtypes: Collection[torch.dtype]) -> None:
    if tuple(found.shape) != (number,) or found.dtype not in dtypes:
        raise InputError(
            f"{source} has {name} as {found.dtype} {tuple(found.shape)}, and its selection asks for "
            f"{' or '.join(map(str, dtypes))} ({number},): use another copy"
        )


def check_states(
    states: Mapping[str, Mapping[str, Tensor]], masters: Mapping[str, Tensor], header: CheckpointHeader, source: Path
) -> None:
    """Raise unless ``states`` are those that the header names: fp32, of the masters' names and lengths.

    An optimizer may keep a state for some of the values only, but some state for each of them.

    Args:
        states: by name of the state, then of the values.
        masters: by name of the values, checked.
        header: of the checkpoint.
        source: the file, for errors.

    Raises:
        InputError: names the first that is missing, too many, or of another form.
    """
    found, wanted = sorted(states), header.optimizer_states
    if wanted is None:  # Adam's, before names were recorded.
        wanted = ("exp_avg", "exp_avg_sq") if header.optimizer_step else ()
    if found != list(wanted) or (found and not header.optimizer_step):
        raise InputError(
            f"{source} has the states {shown(found)} after {header.optimizer_step} optimizer steps, and the header "
            f"names {shown(list(wanted))}: use another copy"
        )
    for state, tensors in states.items():
        for name, tensor in tensors.items():
            if name not in masters:
                raise InputError(f"{source} has {state} of {shown(name)}, which has no values: use another copy")
            _check_flat(tensor, f"{state} of {name}", len(masters[name]), source, (torch.float32,))
    without = set(masters).difference(*states.values())
    if states and without:
        raise InputError(f"{source} has no state of {shown(min(without))}: use another copy")


# --- do files belong together? ----------------------------------------------------------------------------------------


def sealed(header: Mapping[str, Any], masters: Mapping[str, Tensor]) -> dict[str, Any]:
    """``header`` with ``masters_sha256``, and ``state_id`` over all of it; without tokens in its ``config``.

    The files of a checkpoint have the ``state_id`` in their metadata: a file of another checkpoint is found out even
    where it has the same names and lengths, and so is a header that was changed.

    Args:
        header: JSON values.
        masters: by name of the values, on the host.

    Raises:
        InputError: the header could not be read again.
    """
    sha = hashlib.sha256()
    for name in sorted(masters):
        sha.update(f"{name}\0".encode())
        sha.update(masters[name].detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    plain = {**header, "config": without_credentials(header.get("config")), "masters_sha256": sha.hexdigest()}
    text = to_json(plain)
    try:
        # As strictly as it will be read: what could be written and not read again is refused before it is.
        content = parse_json(text, strict=True)
    except ValueError as error:
        raise InputError(
            f"extra or config of a checkpoint could not be read again ({error}): store it as text"
        ) from error
    if len(text) > MAX_HEADER_BYTES // 2:  # Indented, and with characters of several bytes, it is longer.
        raise InputError(
            f"extra or config of a checkpoint is too large ({len(text):,} characters): keep it in a file of your own"
        )
    return {**content, "state_id": _state_id(content)}


def _state_id(header: Mapping[str, Any]) -> str:
    content = {name: value for name, value in header.items() if name != "state_id"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_belongs(metadata: Mapping[str, str], header: CheckpointHeader, source: Path) -> None:
    """Raise unless the file ``source`` with these metadata was written for the checkpoint that has the header.

    Raises:
        InputError: it was written for another.
    """
    if header.state_id is not None and metadata.get("state_id") != header.state_id:
        raise InputError(f"{source} belongs to another checkpoint: copy the folder again, or use an older one")
