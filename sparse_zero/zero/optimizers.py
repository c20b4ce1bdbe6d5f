"""Which optimizers train the values, with which settings for each kind of region and for single modules?

``docs/precision.md`` compares them. AdamW (three implementations), 8-bit AdamW and Lion update every entry from its own
state, so that ZeRO's flat partitions change nothing; Adafactor and Muon look at more than one entry, see
:mod:`sparse_zero.zero.shaped_optimizers`.

Weight decay is decoupled from the gradient in all of them: a step takes ``learning rate * weight decay`` of each value
away. Inplace, values are entries of the weight, which decay towards zero; under delta they are differences to the
base, and the entries decay towards the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_args

from sparse_zero.errors import InputError
from sparse_zero.optional import require
from sparse_zero.selection.config import KINDS, Kind, check_patterns

if TYPE_CHECKING:
    import torch
    from torch import nn

OptimizerName = Literal["adamw", "deepspeed_adamw", "adamw_8bit", "lion", "adafactor", "muon"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
# Key of an optimizer group: its learning rate as a share of the common one, which schedules multiply.
RATE_FACTOR = "learning_rate_factor"
# Key of an optimizer group of single modules: the number of their entry.
PER_MODULE = "per_module"


@dataclass(frozen=True, kw_only=True)
class KindOptimizerConfig:
    """What one kind of region has of its own."""

    # In errors.
    _SECTION = "per_kind"

    # Peak learning rate of its values. At most one of this and the factor is set; None for both: the common rate.
    learning_rate: float | None = None
    # Its learning rate as a share of the common one.
    learning_rate_factor: float | None = None
    # Weight decay of its values; None: the common one.
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "learning_rate_factor"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{self._SECTION} {name} is {value}: it must be a positive number")
        if self.weight_decay is not None and not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"{self._SECTION} weight_decay is {self.weight_decay}: it must be at least 0")
        if self.learning_rate is not None and self.learning_rate_factor is not None:
            raise InputError(
                f"{self._SECTION} has learning_rate={self.learning_rate} and "
                f"learning_rate_factor={self.learning_rate_factor}: set at most one of them"
            )


@dataclass(frozen=True, kw_only=True)
class ModuleOptimizerConfig(KindOptimizerConfig):
    """What single modules have of their own, before what their kinds have: a classifier's head a rate, for example."""

    _SECTION = "per_module"

    # Patterns over names of modules or parameters, shell style, with {a,b} alternatives: "classifier",
    # "*.mlp.down_proj". They mean all that is trained inside; what several entries match follows the first of them.
    modules: tuple[str, ...]

    def __post_init__(self) -> None:
        check_patterns("per_module modules", self.modules)
        super().__post_init__()
        if (self.learning_rate, self.learning_rate_factor, self.weight_decay) == (None, None, None):
            raise InputError(
                f"per_module of {', '.join(self.modules)} sets nothing: give it a learning_rate, a "
                "learning_rate_factor or a weight_decay, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class PerKindConfig:
    """Settings of the values of each kind of region; None: the common ones."""

    # Of blocks.
    block: KindOptimizerConfig | None = None
    # Of rows.
    row: KindOptimizerConfig | None = None
    # Of columns.
    column: KindOptimizerConfig | None = None
    # Of biases and norms; a matrix of a head is trained as rows.
    whole: KindOptimizerConfig | None = None

    def named(self) -> dict[Kind, KindOptimizerConfig]:
        """The kinds that have settings of their own."""
        found = {kind: getattr(self, kind) for kind in KINDS}
        return {kind: own for kind, own in found.items() if own is not None}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which optimizer, and its constants."""

    name: OptimizerName = "adamw"
    # Peak learning rate. Lion wants a third to a tenth of AdamW's (arXiv 2302.06675, section 5).
    learning_rate: float = 1e-4
    # Decay of the running means of the gradient and of its square. Adafactor has its own for the square and none of
    # the gradient; Muon uses them for kinds other than blocks. Lion's authors take (0.9, 0.99).
    betas: tuple[float, float] = (0.9, 0.999)
    # Added to the root of the mean square (AdamW's of any kind, and Muon's for kinds other than blocks).
    eps: float = 1e-8
    # Decoupled; towards zero inplace, towards the base under delta.
    weight_decay: float = 0.0
    per_kind: PerKindConfig = field(default_factory=PerKindConfig)
    # Of single modules, before what their kinds have; the first entry that matches is followed.
    per_module: tuple[ModuleOptimizerConfig, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise InputError(f"optimizer name is {self.name!r}: choose one of {', '.join(OPTIMIZERS)}")
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"optimizer {name} is {value}: it must be a positive number")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise InputError(f"optimizer betas are {self.betas}: give two numbers in [0, 1)")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"optimizer weight_decay is {self.weight_decay}: it must be at least 0")


def check_available(name: OptimizerName) -> None:
    """Raise unless what the optimizer needs besides torch and DeepSpeed is installed; nothing is allocated.

    Raises:
        InputError: names the extra to install.
    """
    if name == "adamw_8bit":
        require("bitsandbytes.optim", extra="quant", purpose="keep AdamW's states in 8 bits (adamw_8bit)")


def check_kinds(config: OptimizerConfig, kinds: Sequence[Kind]) -> None:
    """Raise unless the settings fit the kinds of region that are trained.

    Raises:
        InputError: settings of a kind that is not trained, or Muon without blocks.
    """
    trained = ", ".join(dict.fromkeys(kinds))
    for kind in config.per_kind.named():
        if kind not in kinds:
            raise InputError(
                f"per_kind.{kind} is set, but the selection trains {trained} only: remove it, or select such regions"
            )
    if config.name == "muon" and "block" not in kinds:
        raise InputError(
            f"the optimizer muon is for matrices, which blocks are, and the selection trains {trained} only: "
            "use adamw, or select blocks"
        )


def _and_around(name: str) -> list[str]:
    """A parameter's name, and those of the modules that it lies in: "a.b.weight", "a", "a.b"."""
    parts = name.split(".")
    return [name, *(".".join(parts[:end]) for end in range(1, len(parts)))]


def check_modules(config: OptimizerConfig, parameters: Sequence[str]) -> None:
    """Raise unless every pattern of ``per_module`` matches something of a model.

    Args:
        config: of the optimizer.
        parameters: names of all parameters of the model, trained or not.

    Raises:
        InputError: names the entry and the pattern.
    """
    from sparse_zero.selection.candidates import match_names  # heavy, as in module_entry

    names = list(dict.fromkeys(each for name in parameters for each in _and_around(name)))
    for number, entry in enumerate(config.per_module):
        match_names(entry.modules, names, f"per_module.{number}.modules", "module or parameter")


def module_entry(patterns: Sequence[Sequence[str]], parameter: str) -> int | None:
    """The number of the first of several ``per_module`` entries that a parameter of this name follows.

    Args:
        patterns: of each entry.
        parameter: fully qualified name, of the parameter that is trained or whose entries the values are.
    """
    from sparse_zero.selection.candidates import expand_braces

    names = _and_around(parameter)
    for number, entry in enumerate(patterns):
        wanted = [alternative for pattern in entry for alternative in expand_braces(pattern)]
        if any(fnmatchcase(name, pattern) for name in names for pattern in wanted):
            return number
    return None


def _parameter_names(model: nn.Module) -> dict[int, str]:
    """By identity of what may be trained: its name; of values that of the parameter whose entries they are."""
    from sparse_zero.layers.carriers import carriers, parameter_name

    found = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, carrier in carriers(model):
        found.update({id(values): parameter_name(name, carrier) for values in carrier.values().values()})
    return found


def _by_module(group: Mapping[str, Any], config: OptimizerConfig, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """A kind's group, cut into what follows the kind and what follows each entry of ``per_module``, if anything."""
    patterns = [entry.modules for entry in config.per_module]
    parts: dict[int | None, list[Any]] = {None: [], **{number: [] for number in range(len(patterns))}}
    for parameter in group["params"]:
        parts[module_entry(patterns, names[id(parameter)])].append(parameter)
    return [
        {**group, "params": parameters, **({} if number is None else {PER_MODULE: number})}
        for number, parameters in parts.items()
        if parameters
    ]


def configured_groups(
    groups: Sequence[Mapping[str, Any]], config: OptimizerConfig, model: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups with the learning rate and decay of each kind and of single modules.

    Args:
        groups: of :func:`sparse_zero.parameter_groups`: each has ``kind`` and ``params``.
        config: see :class:`OptimizerConfig`; its settings of kinds and modules that no group has are passed over.
        model: whose parameters they are; needed where ``per_module`` is set, by which groups are then cut.
    """
    own, cut = config.per_kind.named(), [dict(group) for group in groups]
    if config.per_module:
        if model is None:
            raise InputError("per_module needs the model, for the names of its modules: pass model=")
        names = _parameter_names(model)
        cut = [part for group in groups for part in _by_module(group, config, names)]
    found = []
    for group in cut:
        # From the widest to the narrowest.
        levels = [own.get(group["kind"], KindOptimizerConfig())]
        if PER_MODULE in group:
            levels.append(config.per_module[group[PER_MODULE]])
        factor, decay = 1.0, config.weight_decay
        for level in levels:
            if level.learning_rate is not None:
                factor = level.learning_rate / config.learning_rate
            elif level.learning_rate_factor is not None:
                factor = level.learning_rate_factor
            decay = decay if level.weight_decay is None else level.weight_decay
        found.append({**group, "lr": config.learning_rate * factor, RATE_FACTOR: factor, "weight_decay": decay})
    return found


def block_shapes(model: nn.Module) -> dict[int, list[tuple[int, int]]]:
    """By identity of the values of a weight's blocks: (height, width) of each block, in the order of the values."""
    from sparse_zero.layers.carriers import carriers

    found: dict[int, list[tuple[int, int]]] = {}
    for _, carrier in carriers(model):
        if "block" not in carrier.values():
            continue
        shapes = found[id(carrier.values()["block"])] = []
        for selection in carrier.selections().values():
            (out_features, in_features), (height, width) = selection.shape, selection.block_shape
            for row, column in selection.blocks.tolist():
                shapes.append((min(height, out_features - row * height), min(width, in_features - column * width)))
    return found


def build_optimizer(
    groups: Sequence[Mapping[str, Any]],
    config: OptimizerConfig,
    *,
    model: nn.Module | None = None,
    offloaded: bool = False,
    kinds: Sequence[Kind] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over the values, for :func:`sparse_zero.initialize`.

    ``sz.initialize(model=model, optimizer=lambda groups: build_optimizer(groups, config, model=model), ...)``

    Args:
        groups: of :func:`sparse_zero.parameter_groups`.
        config: see :class:`OptimizerConfig`.
        model: the sparsified model; Muon reads the shapes of its blocks, ``per_module`` the names of its modules.
        offloaded: whether ZeRO keeps the states in the host's memory, where ``deepspeed_adamw`` and ``lion`` are then
            computed. DeepSpeed compiles both for the machine when they are first used.
        kinds: of region that may be trained, now or after a re-selection; default: those of ``groups``.

    Raises:
        InputError: see :func:`check_available` and :func:`check_kinds`; or Muon or ``per_module`` without a
            model.
    """
    import torch  # heavy, as what follows: the settings above are read by commands that train nothing

    check_available(config.name)
    check_kinds(config, [group["kind"] for group in groups] if kinds is None else kinds)
    configured = configured_groups(groups, config, model)
    on_host = offloaded or configured[0]["params"][0].device.type == "cpu"
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    adam: dict[str, Any] = {**common, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw":
        return torch.optim.AdamW(configured, **adam, fused=True)
    if config.name == "deepspeed_adamw":
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        found: torch.optim.Optimizer = (DeepSpeedCPUAdam if on_host else FusedAdam)(configured, **adam)
        return found
    if config.name == "adamw_8bit":
        optim = require("bitsandbytes.optim", extra="quant", purpose="keep AdamW's states in 8 bits (adamw_8bit)")
        eight_bit: torch.optim.Optimizer = optim.AdamW8bit(configured, **adam)
        return eight_bit
    if config.name == "lion":
        from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

        lion: torch.optim.Optimizer = (DeepSpeedCPULion if on_host else FusedLion)(
            configured, **common, betas=config.betas
        )
        return lion
    from sparse_zero.zero.shaped_optimizers import Adafactor, BlockMuon

    if config.name == "adafactor":
        return Adafactor(configured, **common)
    if model is None:
        raise InputError("the optimizer muon needs the model, for the shapes of its blocks: pass model=")
    return BlockMuon(configured, **adam, block_shapes=block_shapes(model))
