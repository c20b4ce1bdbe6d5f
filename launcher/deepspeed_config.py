"""Which DeepSpeed config does a run need, and does the user's own one agree with it?"""

import copy
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import RunConfig
from launcher.yaml_files import read_text
from sparse_zero.errors import InputError
from sparse_zero.zero.unsupported import HPZ, QUANTIZED, check_settings, offload_device

if TYPE_CHECKING:
    from pydantic import ValidationError

_AUTO = "auto"
# Sections that would take over what the run itself does.
_REFUSED = {
    "optimizer": "the run's training section is the optimizer; set learning_rate and the like there",
    "scheduler": "the run's training section is the schedule; set schedule and the like there",
}
# Where each value that a run decides comes from, for messages.
_SOURCES = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size / (micro_batch_size * ranks)",
    "gradient_clipping": "training.max_gradient_norm",
    "zero_optimization.stage": "zero.stage",
    "bf16.enabled": "training.precision",
    "fp16.enabled": "training.precision",
    "zero_allow_untested_optimizer": "the run's own optimizer",
    "zero_force_ds_cpu_optimizer": "the run's own optimizer",
    "zero_optimization.offload_optimizer.device": "zero.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "zero.nvme_path",
    "zero_optimization.offload_param.device": "zero.offload_base",
    "zero_optimization.offload_param.nvme_path": "zero.nvme_path",
}
# Sections of what is offloaded, and the fields that say where to.
OFFLOADS = {"offload_optimizer": "zero.offload_optimizer", "offload_param": "zero.offload_base"}
# Sections in which DeepSpeed has a default for every key, so that an "auto" there can simply be left out.
_SECTIONS_WITH_DEFAULTS = ("zero_optimization", "bf16", "fp16")
# What follows from the run only when the world size is known.
_OF_THE_WORLD = ("train_batch_size", "gradient_accumulation_steps")
# Keys that hold a secret: one of the words, whole (a tokenizer is none). Capitals inside a key start a word.
_SECRET = re.compile(r"(?<![a-z])(api[_-]?key|token|password|secret)s?(?![a-z])", re.IGNORECASE)
_WORD_START = re.compile(r"(?<=[a-z])(?=[A-Z])")


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches per rank between two optimizer steps; the last may be padding."""
    if world_size < 1:
        raise InputError(f"the world size is {world_size}: a run needs at least one rank")
    return -(-config.training.global_batch_size // (config.training.micro_batch_size * world_size))


def deepspeed_config(config: RunConfig, world_size: int | None) -> dict[str, Any]:
    """The DeepSpeed config of ``config`` on ``world_size`` ranks.

    An own config (``zero.config``) is the start: what it leaves open or says ``"auto"`` to is filled in.

    Args:
        config: the run.
        world_size: ranks; None while nobody knows, which leaves out what depends on it: an own value is then not
            compared, and an "auto" not filled.

    Raises:
        InputError: where the own config contradicts the run, by dotted name and with both values.
    """
    own = read_own_config(config)
    for path, value in _decided(config).items():
        _fill(own, path, value)
    if offload_device(own, "offload_optimizer"):
        # DeepSpeed would insist on its own CPU Adam; the run hands it the optimizer of its training section.
        _fill(own, ("zero_force_ds_cpu_optimizer",), False)
    if world_size is None:
        for name in _OF_THE_WORLD:
            if own.get(name) == _AUTO:
                del own[name]
    else:
        _fill_batch_sizes(own, config, world_size)
    # Quiet: the run writes its own metrics. Own settings win, since they change no result.
    own.setdefault("steps_per_print", 2**31 - 1)
    own.setdefault("wall_clock_breakdown", False)
    _drop_open(own)
    return own


def check_own_config(config: RunConfig) -> None:
    """Refuse a DeepSpeed config that contradicts the run in what does not depend on the world size.

    Also settings that no machine could train with, by name.
    """
    settings = deepspeed_config(config, None)
    check_settings(settings, config.zero.placement)
    _check_can_be_read(settings, config)


def check_can_train_here(config: RunConfig) -> None:
    """Refuse offloading and ZeRO++ options for which this machine lacks a folder, a library or a GPU.

    Raises:
        InputError: names the field and the remedy.
    """
    section = deepspeed_config(config, None)["zero_optimization"]
    _check_disk(section)
    quantized = [name for name in QUANTIZED if section.get(name)]
    if quantized:
        import torch

        if not torch.cuda.is_available():
            raise InputError(f"zero.options.{quantized[0]} needs CUDA, and this machine has none: remove it")


def _check_can_be_read(settings: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse what would have to read or write values or states that DeepSpeed keeps on a disk.

    With the base, it puts the values there.

    Raises:
        InputError: names the field and the remedy.
    """
    reselects = {"selection.reselect": config.selection.reselect is not None}
    ends = {"output.merged": config.output.merged, "output.evaluate": config.output.evaluate}
    for section, what, wanted in (
        ("offload_optimizer", "states", reselects),
        ("offload_param", "values", {**reselects, **ends}),
    ):
        for name, is_wanted in wanted.items():
            if is_wanted and offload_device(settings, section) == "nvme":
                remedy = f"set {name} to false" if name in ends else f"leave {name} out"
                raise InputError(
                    f"{OFFLOADS[section]} (zero_optimization.{section}.device) is 'nvme', where {name} cannot reach "
                    f"the {what}: use cpu, or {remedy}"
                )


def check_can_continue(config: RunConfig) -> None:
    """Refuse to continue from a checkpoint where DeepSpeed keeps on a disk what the checkpoint would be put into.

    Raises:
        InputError: names the field and the remedy.
    """
    settings = deepspeed_config(config, None)
    for section, field in OFFLOADS.items():
        if offload_device(settings, section) == "nvme":
            raise InputError(
                f"{field} (zero_optimization.{section}.device) is 'nvme', where a checkpoint cannot be put: continue "
                "with cpu or none, or start anew in another output.folder"
            )


def _check_disk(section: Mapping[str, Any]) -> None:
    """Refuse offloading to a disk that is not there, or that this machine cannot read asynchronously."""
    settings = {"zero_optimization": section}
    to_disk = [each for each in OFFLOADS if offload_device(settings, each) == "nvme"]
    for each in to_disk:
        path = section[each].get("nvme_path")
        if not path or not Path(path).is_dir():
            raise InputError(f"zero.nvme_path is {path!r}, which is no folder: name one on a local disk of every node")
    if to_disk:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise InputError(
                f"{OFFLOADS[to_disk[0]]} is 'nvme', and DeepSpeed's "
                "asynchronous I/O cannot be built here: install libaio (libaio-dev), or use cpu"
            )


def validate_with_deepspeed(settings: Mapping[str, Any], world_size: int) -> None:
    """Let DeepSpeed itself read ``settings``, a result of :func:`deepspeed_config`. Needs no process group.

    Raises:
        InputError: a key that DeepSpeed does not know, or a value that it refuses, by its dotted name.
    """
    from deepspeed import comm  # takes seconds
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    tried = copy.deepcopy(dict(settings))
    if not comm.is_initialized():
        # DeepSpeed then takes one rank for granted, and would find the product of the batch sizes wrong.
        tried["train_batch_size"] //= world_size
    try:
        DeepSpeedConfig(tried)
    except ValidationError as error:
        raise InputError(_told_by_pydantic(settings, error)) from error
    except Exception as error:  # assertions, ValueErrors, and TypeErrors where a section is no object
        problem = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"DeepSpeed refuses the config of zero.config and zero.options: {problem}") from error


def read_own_config(config: RunConfig) -> dict[str, Any]:
    """A copy of the user's DeepSpeed config, or an empty one; sections that the run owns are refused."""
    own = config.zero.config
    if own is None:
        return {}
    if isinstance(own, str):
        text = read_text(Path(own), "the DeepSpeed config zero.config")
        try:
            own = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            problem = " ".join(str(error).split())
            raise InputError(f"zero.config {config.zero.config} is not valid JSON: {problem}") from error
        if not isinstance(own, dict):
            raise InputError(f"zero.config {config.zero.config} holds no JSON object at its top level")
    for section, remedy in _REFUSED.items():
        if section in own:
            raise InputError(f"{section} is set in the DeepSpeed config zero.config: remove it, {remedy}")
    for path, value in _entries(own):
        texts = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str) and each]
        if texts and _SECRET.search(_WORD_START.sub("_", path[-1])):
            # Its value is not told: the message may end in a log.
            raise InputError(
                f"{'.'.join(path)} is a secret in the DeepSpeed config zero.config, which is saved with the run: "
                "remove it, and give it in the environment variable that the service reads"
            )
    return copy.deepcopy(own)


def _decided(config: RunConfig) -> dict[tuple[str, ...], Any]:
    """Paths and values that the run decides whatever the world size."""
    training, zero = config.training, config.zero
    decided: dict[tuple[str, ...], Any] = {
        ("train_micro_batch_size_per_gpu",): training.micro_batch_size,
        ("gradient_clipping",): training.max_gradient_norm or 0.0,
        ("zero_optimization", "stage"): zero.stage,
        ("bf16", "enabled"): training.precision == "bf16",
        ("fp16", "enabled"): training.precision == "fp16",
        # The run hands DeepSpeed an optimizer of its own, which no config section then has to build.
        ("zero_allow_untested_optimizer",): True,
    }
    for key, value in zero.options.items():
        decided["zero_optimization", key] = copy.deepcopy(value)
    for section, device in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_base)):
        if device != "none":
            # DeepSpeed pins host memory by itself where there is a GPU.
            decided["zero_optimization", section, "device"] = device
        if device == "nvme":
            decided["zero_optimization", section, "nvme_path"] = zero.nvme_path
    return decided


def _fill_batch_sizes(own: dict[str, Any], config: RunConfig, world_size: int) -> None:
    accumulation = accumulation_steps(config, world_size)
    _fill(own, ("gradient_accumulation_steps",), accumulation)
    ranks_per_copy = own["zero_optimization"].get(HPZ, 1)
    if isinstance(ranks_per_copy, int) and (ranks_per_copy < 1 or world_size % ranks_per_copy):
        raise InputError(
            f"zero.options.{HPZ} is {ranks_per_copy}, which does not divide the {world_size} ranks: use the number of "
            "ranks on a node"
        )
    # DeepSpeed insists on this product. It exceeds the run's global batch where that does not divide: the
    # surplus is masked samples, which count nowhere.
    product = config.training.micro_batch_size * accumulation * world_size
    batch = own.get("train_batch_size", _AUTO)
    if batch not in (_AUTO, product, config.training.global_batch_size):
        _refuse("train_batch_size", batch, config.training.global_batch_size)
    own["train_batch_size"] = product


def _fill(own: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set what ``path`` leads to in ``own``, unless it says something else already, which is refused."""
    *sections, key = path
    name = ".".join(path)
    target = own
    for section in sections:
        if target.get(section) == _AUTO:
            target[section] = {}
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise InputError(f"{section} is {target!r} in the DeepSpeed config zero.config: expected an object")
    present = target.get(key, _AUTO)
    # True == 1 in Python; here a switch is no number.
    if present != _AUTO and (present != value or isinstance(present, bool) != isinstance(value, bool)):
        _refuse(name, present, value)
    target[key] = value


def _refuse(name: str, present: Any, value: Any) -> None:
    source = _SOURCES.get(name, name.replace("zero_optimization.", "zero.options."))
    raise InputError(
        f"{name} is {present!r} in the DeepSpeed config zero.config, but {value!r} by {source}: "
        f'change one of them, or write "auto" there'
    )


def _drop_open(own: dict[str, Any]) -> None:
    """Take out every "auto" that DeepSpeed has a default for; name any other."""
    for path in [path for path, value in _entries(own) if value == _AUTO]:
        if path[0] not in _SECTIONS_WITH_DEFAULTS:
            raise InputError(
                f'{".".join(path)} is "auto" in the DeepSpeed config zero.config, unknown to the run: '
                "write a value, or remove it"
            )
        target: Any = own
        for key in path[:-1]:
            target = target[int(key)] if isinstance(target, list) else target[key]
        del target[path[-1]]


def _entries(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The path and value of every key in ``value``, at any depth; indices stand for places in lists."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield (*path, key), item
            yield from _entries(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _entries(item, (*path, str(index)))


def _told_by_pydantic(settings: Mapping[str, Any], error: "ValidationError") -> str:
    """The first complaint of DeepSpeed's validation, in one line."""
    first = error.errors(include_url=False)[0]
    # DeepSpeed validates each section by itself: the place that is named starts inside of it.
    inside = tuple(str(key) for key in first["loc"])
    path = next((found for found, _ in _entries(settings) if found[-len(inside) :] == inside), inside)
    name = ".".join(path)
    source = "zero.config"
    if path[0] == "zero_optimization":
        source += f" or zero.options ({'.'.join(('zero.options', *path[1:]))})"
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(inside[-1], _known_keys(path[:-1]), n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "remove it"
        return f"{name} is unknown to DeepSpeed: it stands in {source}; {hint}"
    return f"{name} is {first['input']!r}, which DeepSpeed refuses ({first['msg']}): change it in {source}"


def _known_keys(section: tuple[str, ...]) -> list[str]:
    """The keys of the section that runs mostly change; none of the others."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return list(DeepSpeedZeroConfig.model_fields) if section == ("zero_optimization",) else []


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"the key {sorted(twice)[0]!r} stands twice")
    return dict(pairs)
