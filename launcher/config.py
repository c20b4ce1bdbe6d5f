"""What is one run: which sections does its YAML have, and what do they hold after every check?

Each section is a dataclass that lives beside the code which owns it. Relative paths in a config start at the
current directory; a leading ``~`` is the home directory.
"""

import dataclasses
import difflib
import functools
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints, overload

from pydantic import TypeAdapter, ValidationError

from launcher.emitting.batch_config import BatchConfig
from launcher.memory.memory_config import MemoryConfig
from launcher.starting.cluster_config import ClusterConfig
from launcher.training_config import CheckpointConfig, OutputConfig, TrainingConfig, check_seed
from launcher.yaml_files import Prepare, dump_yaml, parse_yaml, read_mapping
from models.data import DataConfig
from models.loading import ModelConfig
from sparse_zero.credentials import find_credential, without_credentials
from sparse_zero.errors import InputError
from sparse_zero.selection.config import SelectionConfig
from sparse_zero.zero.config import ZeroConfig

# Fields that may hold a path and therefore a leading "~".
_PATH_FIELDS = (
    "model.name_or_path",
    "model.tokenizer",
    "data.train",
    "data.validation",
    "data.test",
    "data.calibration",
    "data.forgetting",
    "selection.file",
    "selection.accumulator_folder",
    "zero.config",
    "checkpoint.resume",
    "output.folder",
    "cluster.hostfile",
    "cluster.export_file",
)
# Of a whole number; what settings reach (generators, files) has no room for more.
_MAX_BITS = 63
_MISSING = object()
# In the metadata of a field of a config: it follows from others, and no file has it.
NOT_WRITTEN = "not_written"
_Kind = TypeVar("_Kind")
_Run = TypeVar("_Run", bound="RunConfig")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides one run."""

    # Which weights and tokenizer.
    model: ModelConfig
    # Which samples, in which form, and how answers are judged.
    data: DataConfig
    # Which regions are trained.
    selection: SelectionConfig
    # Schedule, batches, optimizer.
    training: TrainingConfig
    # ZeRO stage, placement, own DeepSpeed config.
    zero: ZeroConfig
    # When checkpoints are written and continued from.
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # The run folder and what goes into it.
    output: OutputConfig
    # What is measured, simulated and said of memory.
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    # Where the ranks start; read by `sparse-zero launch` only.
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    # What a batch system is told; read by `sparse-zero launch --emit` only.
    batch: BatchConfig = field(default_factory=BatchConfig)

    @property
    def calibrates(self) -> bool:
        """Whether anything is scored by gradients or activations, and so by calibration data.

        Raises:
            InputError: a score that does not exist.
        """
        return self.selection.file is None and self.selection.needs_data

    def __post_init__(self) -> None:
        self._check_task()
        check_seed("selection.seed", self.selection.seed)
        if self.output.evaluate and self.data.test is None:
            raise InputError("output.evaluate is true but data.test is missing: name the data, or set it to false")
        if self.training.validation_every is not None and self.data.validation is None:
            raise InputError(
                f"training.validation_every is {self.training.validation_every} but data.validation is "
                "missing: name the data, or leave validation_every out"
            )
        if self.training.prefix_cache is not None and self.selection.reselect is not None:
            raise InputError(
                "training.prefix_cache is set with selection.reselect, which may train other layers later on: leave "
                "one of them out"
            )
        if self.checkpoint.keep_best == "validation_loss" and self.data.validation is None:
            raise InputError(
                "checkpoint.keep_best is 'validation_loss' but data.validation is missing: name the data, or set it to "
                "none"
            )

    def _check_task(self) -> None:
        """Refuse what does not go with what the model does."""
        kind = self.data.evaluation.kind
        if not self.model.classifies:
            if self.data.fields.classifies:
                raise InputError(
                    f"data.fields.label is {self.data.fields.label!r} with model.task {self.model.task}: set "
                    "model.task to sequence_classification, or leave the label out"
                )
            if kind == "classify":
                raise InputError(
                    f"data.evaluation.kind is 'classify' with model.task {self.model.task}: set model.task to "
                    "sequence_classification, or use generate or choice"
                )
            return
        if not self.data.fields.classifies:
            raise InputError(
                "data.fields.label is missing, and model.task is 'sequence_classification': name the fields of a "
                "record, data.fields.text and data.fields.label"
            )
        if self.data.labels is not None and len(self.data.labels) != self.model.num_labels:
            raise InputError(
                f"data.labels has {len(self.data.labels)} words and model.num_labels is {self.model.num_labels}: give "
                "one for each class, and none for numbers"
            )
        for name, value, allowed in (
            ("data.batching", self.data.batching, ("pad",)),
            ("data.template", self.data.template, ("alpaca", "plain")),
            ("data.evaluation.kind", kind, (None, "classify")),
            ("data.evaluation.options", self.data.evaluation.options, (None,)),
            ("data.forgetting", self.data.forgetting, (None,)),
            ("training.loss_chunk", self.training.loss_chunk, (None,)),
            ("training.kernels", self.training.kernels, ("torch",)),
            ("training.prefix_cache", self.training.prefix_cache and "set", (None,)),
        ):
            if value not in allowed:
                raise InputError(
                    f"{name} is {value!r} with model.task sequence_classification, where it has no meaning or is not "
                    "supported: leave it out"
                )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that the YAML file ``path`` describes, changed by ``overrides``.

    Args:
        path: the file; its ``extends`` is followed (see :func:`launcher.yaml_files.read_mapping`).
        overrides: ``--section.key=value`` (the dashes may be missing), values in YAML, applied in order. A
            number in the key is an index: ``--selection.regions.0.block_size=64``.

    Raises:
        InputError: for anything that does not hold, naming the field, its value and the remedy.
    """
    return parse_config(read_with_overrides(path, overrides), source=str(path))


def read_with_overrides(path: str | Path, overrides: Sequence[str], prepare: Prepare | None = None) -> dict[str, Any]:
    """What stands in a config file, changed by overrides, before any of it is checked.

    Args:
        path: the file.
        overrides: see :func:`load_config`.
        prepare: see :func:`launcher.yaml_files.read_mapping`.

    Raises:
        InputError: the file cannot be read, or an override has no place or a credential in it.
    """
    mapping = read_mapping(path, prepare)
    for override in overrides:
        if find_credential(override) is not None:  # Before it can stand in another error.
            _refuse_credential(override.removeprefix("--").partition("=")[0], "the overrides")
        apply_override(mapping, override)
    return mapping


def refuse_credentials(mapping: Mapping[str, Any], source: str) -> None:
    """Raise where a config holds a token, a password or a signed address.

    Raises:
        InputError: names the field, and not its value.
    """
    credential = find_credential(mapping)
    if credential is not None:
        _refuse_credential(credential, source)


@overload
def parse_config(mapping: Mapping[str, Any], source: str = "the config") -> RunConfig: ...
@overload
def parse_config(mapping: Mapping[str, Any], source: str, kind: type[_Run]) -> _Run: ...
def parse_config(
    mapping: Mapping[str, Any], source: str = "the config", kind: type[RunConfig] = RunConfig
) -> RunConfig:
    """The run that ``mapping`` describes, as read from YAML; errors say that it stands in ``source``.

    Args:
        mapping: of sections.
        source: where it stands.
        kind: of run: one with other sections is a subclass.
    """
    refuse_credentials(mapping, source)
    if "sweep" in mapping:
        raise InputError(
            f"{source} has a section sweep, so it is many runs: start them with `sparse-zero sweep --config FILE`, or "
            "take the section out"
        )
    return parse_as(kind, _expand_home(mapping), source)


def parse_as(kind: type[_Kind], mapping: Mapping[str, Any], source: str) -> _Kind:
    """A config of another kind, a dataclass, by the rules and with the errors of a run's; it says what is wrong.

    Args:
        kind: the dataclass.
        mapping: as read from YAML.
        source: where it stands, for errors.

    Raises:
        InputError: names the key, its value and the remedy.
    """
    _check_keys(kind, mapping, (), source, kind)
    _refuse_huge(mapping, ())
    return _validate(mapping, kind)


def _refuse_credential(name: str, source: str) -> NoReturn:
    """The value is not told: the message may end in a log."""
    raise InputError(
        f"{without_credentials(name)} holds a token, a password or a signed address in {source}, and the config is "
        "saved with the run: remove it, and log in by the environment (HF_TOKEN) or the service's own command"
    )


def named_paths(config: RunConfig) -> dict[str, str]:
    """The files and folders that a config names, by setting; names of the hub are among them."""
    found: dict[str, str] = {}
    for name in _PATH_FIELDS:
        section, _, key = name.partition(".")
        value = getattr(getattr(config, section), key)
        if isinstance(value, str):
            found[name] = value
    return found


def resolved_yaml(config: RunConfig) -> str:
    """``config`` with every default written out; :func:`load_config` reads it back as an equal config."""
    return dump_yaml(_plain(config))


def apply_override(mapping: dict[str, Any], override: str) -> None:
    """Set in ``mapping`` what one ``--section.key=value`` says."""
    name, equals, text = override.removeprefix("--").partition("=")
    keys = name.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise InputError(f"{override} is no override: write --section.key=value, as in --training.steps=100")
    set_value(mapping, name, parse_yaml(text, f"the value of --{name}"), override)


def set_value(mapping: dict[str, Any], name: str, value: Any, said: str) -> None:
    """Set what the dotted key ``name`` of ``mapping`` names, in place.

    Args:
        mapping: a config; sections that are not there are made.
        name: a number in it is an index of a list.
        value: what is put there.
        said: what the user gave, for the start of an error.

    Raises:
        InputError: there is no such place.
    """
    keys = name.split(".")
    target: Any = mapping
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth])
        last = depth == len(keys) - 1
        if isinstance(target, list):
            if not key.isdecimal() or int(key) >= len(target):
                raise InputError(f"{said}: {here} has {len(target)} entries, numbered from 0; {key!r} is none")
            if last:
                target[int(key)] = value
            target = target[int(key)]
        elif isinstance(target, dict):
            if last:
                target[key] = value
            elif target.get(key) is None:
                target[key] = {}
            target = target[key]
        else:
            raise InputError(f"{said}: {here} is {target!r}, which has no {key!r} inside")


# --- keys and choices: what pydantic leaves unsaid for standard dataclasses ---------------------------------


def _check_keys(expected: Any, value: Any, path: tuple[str, ...], source: str, root: type[Any]) -> None:
    """Refuse unknown keys, missing ones, and values outside a closed set, at any depth of ``value``.

    ``root`` is the whole config, of which ``expected`` is what stands at ``path``.
    """
    options = _options(expected)
    if get_origin(expected) is Literal:
        _check_choice(options, value, path)
        return
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            hints = get_type_hints(option)
            for key, item in value.items():
                if key not in hints:
                    raise InputError(_unknown_key((*path, str(key)), list(hints), source, root))
                _check_keys(hints[key], item, (*path, key), source, root)
            for each in dataclasses.fields(option):
                required = each.default is each.default_factory is dataclasses.MISSING
                if required and each.name not in value:
                    raise InputError(f"{'.'.join((*path, each.name))} is missing in {source}: it has no default")
        elif get_origin(option) is tuple and isinstance(value, list):
            for index, item in enumerate(value):
                _check_keys(get_args(option)[0], item, (*path, str(index)), source, root)
        elif get_origin(option) is Literal and value is not None:
            _check_choice(get_args(option), value, path)


def _refuse_huge(value: Any, path: tuple[str, ...]) -> None:
    """Refuse whole numbers that nothing has room for, at any depth of ``value``."""
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            _refuse_huge(item, (*path, str(key)))
    elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
        number = str(value) if value.bit_length() < 1000 else "too large to be shown"
        raise InputError(f"{'.'.join(path)} is {number}: give a whole number of at most {_MAX_BITS} bits")


def _check_choice(choices: Sequence[Any], value: Any, path: tuple[str, ...]) -> None:
    # 1 == True == 1.0 in Python, but not in a config.
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return
    names = [str(choice) for choice in choices]
    nearest = difflib.get_close_matches(str(value), names, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "choose one of them"
    raise InputError(f"{'.'.join(path)} is {value!r}: it may be {', '.join(names)}; {hint}")


def _unknown_key(path: tuple[str, ...], known: list[str], source: str, root: type[Any]) -> str:
    *above, key = path
    nearest = difflib.get_close_matches(key, known, n=1)
    if nearest:
        hint = f"did you mean {'.'.join((*above, nearest[0]))}?"
    else:
        # Often the right key in the wrong section.
        # Where several have it, the outermost.
        names = sorted(_all_keys(root, ()), key=lambda name: -name.count("."))
        everywhere = {name.rpartition(".")[2]: name for name in names}
        elsewhere = difflib.get_close_matches(key, list(everywhere), n=1, cutoff=0.8)
        hint = f"did you mean {everywhere[elsewhere[0]]}?" if elsewhere else f"known are {', '.join(known)}"
    return f"unknown key {'.'.join(path)} in {source}: {hint}"


def _all_keys(expected: Any, path: tuple[str, ...]) -> Iterator[str]:
    for option in _options(expected):
        if dataclasses.is_dataclass(option):
            for key, inner in get_type_hints(option).items():
                yield ".".join((*path, key))
                yield from _all_keys(inner, (*path, key))
        elif get_origin(option) is tuple:
            yield from _all_keys(get_args(option)[0], (*path, "0"))


def _options(expected: Any) -> tuple[Any, ...]:
    """The alternatives of a union; of anything else, itself (of a Literal, its choices)."""
    origin = get_origin(expected)
    if origin in (Union, types.UnionType, Literal):
        return get_args(expected)
    return (expected,)


# --- types ------------------------------------------------------------------------------------------------


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Made when it is first used: it takes a twentieth of a second."""
    return TypeAdapter(kind)


def _validate(mapping: Mapping[str, Any], kind: type[_Kind]) -> _Kind:
    # In its JSON form pydantic's strict mode takes lists for tuples and mappings for dataclasses, and nothing
    # else for anything else: no "yes" for a bool, no 1 for a text, no "1" for a number.
    described: Any = kind
    try:
        found: _Kind = _adapter(described).validate_json(json.dumps(mapping), strict=True)
        return found
    except ValidationError as error:
        errors = error.errors(include_url=False)
        first = errors[0]
        cause = first.get("ctx", {}).get("error")
        if first["type"] == "value_error" and isinstance(cause, ValueError):
            raise InputError(" ".join(str(cause).split())) from error
        path, value = _locate(mapping, first["loc"])
        expected = dict.fromkeys(_expected(each) for each in errors if _locate(mapping, each["loc"])[0] == path)
        raise InputError(f"{'.'.join(path)} is {value!r}: expected {' or '.join(expected)}") from error


def _locate(mapping: Mapping[str, Any], location: Sequence[int | str]) -> tuple[tuple[str, ...], Any]:
    """The path of a pydantic location in ``mapping``, without members of unions, and its value."""
    value: Any = mapping
    path: list[str] = []
    for key in location:
        inside = key in value if isinstance(value, Mapping) else isinstance(value, list) and isinstance(key, int)
        if not inside:
            break
        value = value[key]
        path.append(str(key))
    return tuple(path), value


def _expected(error: Any) -> str:
    """What a field wants, in words, from one pydantic error."""
    return {
        "int_type": "an integer",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "a text (in quotes where it looks like something else)",
        "tuple_type": "a list",
        "list_type": "a list",
        "dict_type": "a mapping",
        "dataclass_type": "a mapping",
    }.get(error["type"], error["msg"])


def _expand_home(mapping: Mapping[str, Any]) -> dict[str, Any]:
    expanded = {key: dict(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}
    for name in _PATH_FIELDS:
        section, _, key = name.partition(".")
        inside = expanded.get(section)
        value = inside.get(key, _MISSING) if isinstance(inside, dict) else _MISSING
        if isinstance(inside, dict) and isinstance(value, str) and value.startswith("~"):
            try:
                inside[key] = str(Path(value).expanduser())
            except RuntimeError as error:
                raise InputError(f"{name} is {value!r}: that user has no home directory") from error
    return expanded


def _plain(value: Any) -> Any:
    """``value`` with dataclasses as mappings and tuples as lists."""
    if dataclasses.is_dataclass(value):
        fields = [each for each in dataclasses.fields(value) if not each.metadata.get(NOT_WRITTEN)]
        return {each.name: _plain(getattr(value, each.name)) for each in fields}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
