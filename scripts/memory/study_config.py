"""Which memory is studied: of which models, methods, worlds, lengths, batches and budgets?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from launcher.plan.defaults import PlanMethod
from sparse_zero.errors import InputError

# smt-nf4: SMT's blocks beside a base in NF4.
StudyMethod = Literal[
    "smt", "rocoft-rows", "rocoft-columns", "mixed", "diablo", "smt-nf4", "full", "lora", "dora", "qlora"
]
METHODS: tuple[StudyMethod, ...] = get_args(StudyMethod)
Stage = Literal[0, 1, 2, 3]
assert set(get_args(PlanMethod)) < set(METHODS)


def _check_some(name: str, values: Sequence[object]) -> None:
    if not values:
        raise InputError(f"{name} is empty: give at least one")
    if len(set(values)) != len(values):
        raise InputError(f"{name} is {list(values)}: give each once")


def _check_positive(name: str, values: Sequence[float]) -> None:
    _check_some(name, values)
    for value in values:
        if value <= 0:
            raise InputError(f"{name} has {value}: it must be more than 0")


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The job that every curve starts from; a curve changes one thing of it."""

    # A built-in model, see `sparse-zero plan --help`.
    model: str = "llama-2-7b"
    world_size: int = 8
    stage: Stage = 2
    # Tokens of a sample, and samples of a rank in one forward pass.
    length: int = 2048
    micro_batch: int = 1
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        _check_positive("base.world_size", [self.world_size])
        _check_positive("base.length", [self.length])
        _check_positive("base.micro_batch", [self.micro_batch])


@dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """The largest model that so many GPUs can train: Llamas with as many layers as there are 128s in their width."""

    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    # Memory of one, in GiB.
    gpu_gib: tuple[float, ...] = (24.0, 80.0)
    methods: tuple[StudyMethod, ...] = ("smt", "full", "qlora")
    # Of these, the one that bears the largest model.
    stages: tuple[Stage, ...] = (2, 3)
    # Layers of the largest Llama that is tried; 96 are 174 billion parameters.
    most_layers: int = 96

    def __post_init__(self) -> None:
        _check_positive("frontier.gpus", self.gpus)
        _check_positive("frontier.gpu_gib", self.gpu_gib)
        _check_some("frontier.methods", self.methods)
        _check_some("frontier.stages", self.stages)
        if self.most_layers < 2:
            raise InputError(f"frontier.most_layers is {self.most_layers}: it must be at least 2")


@dataclass(frozen=True, kw_only=True)
class HeadlineConfig:
    """By how much SMT's recipe needs less than full fine-tuning, in setups that the paper leaves open."""

    models: tuple[str, ...] = ("llama-2-7b", "llama-2-13b")
    # Share that is said to be saved.
    claimed: float = 0.67
    world_sizes: tuple[int, ...] = (1, 2, 4, 8)
    stages: tuple[Stage, ...] = (0, 2, 3)
    length: int = 2048
    micro_batch: int = 1

    def __post_init__(self) -> None:
        _check_some("headline.models", self.models)
        _check_positive("headline.world_sizes", self.world_sizes)
        _check_some("headline.stages", self.stages)
        if not 0 < self.claimed < 1:
            raise InputError(f"headline.claimed is {self.claimed}: it must lie in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """Which points of the curves are simulated as well."""

    methods: tuple[StudyMethod, ...] = ("smt", "lora", "full")
    # Values on the axes; those that a curve does not have are passed over.
    world_sizes: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    micro_batches: tuple[int, ...] = ()
    budgets: tuple[float, ...] = ()
    models: tuple[str, ...] = ()
    # Of the setups of the headline, those on so many ranks; the models of the headline.
    headline_world_sizes: tuple[int, ...] = ()
    # Simulations at once.
    workers: int = 2

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"simulate.workers is {self.workers}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One study."""

    base: BaseConfig = field(default_factory=BaseConfig)
    methods: tuple[StudyMethod, ...] = METHODS
    # Axes of the curves.
    world_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    stages: tuple[Stage, ...] = (0, 1, 2, 3)
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    micro_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    # Trained shares of all parameters.
    budgets: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
    # From small to large.
    models: tuple[str, ...] = ("smollm2-135m", "tinyllama-1.1b", "llama-2-7b", "llama-2-13b", "llama-2-70b")
    frontier: FrontierConfig = field(default_factory=FrontierConfig)
    headline: HeadlineConfig = field(default_factory=HeadlineConfig)
    simulate: SimulateConfig = field(default_factory=SimulateConfig)

    def __post_init__(self) -> None:
        _check_some("methods", self.methods)
        _check_some("models", self.models)
        _check_some("stages", self.stages)
        for name in ("world_sizes", "lengths", "micro_batches", "budgets"):
            _check_positive(name, getattr(self, name))
        if max(self.budgets) > 0.5:
            raise InputError(f"budgets has {max(self.budgets)}: a share of the parameters up to 0.5 is studied")
