"""What is one point of a memory study, and what do the closed form and the simulation say of it?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.config import RunConfig, parse_config, resolved_yaml
from launcher.plan.defaults import PEERS, default_run, described, peer_changes
from launcher.plan.planned_run import PlannedRun, plan_run
from launcher.yaml_files import parse_yaml
from scripts.memory.study_config import StudyConfig, StudyMethod

# A grid of N x N has blocks of which one in N is trained: below this share there are too many to choose among.
_LEAST_DIABLO = 0.01
TRAINING = ("engine", "forward", "backward", "step")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One job in one of the study's curves."""

    # Which axis it varies: world_size, length, micro_batch, budget, model, headline, frontier.
    curve: str
    # A built-in model, or the folder of one.
    model: str
    method: StudyMethod
    world_size: int
    stage: int
    length: int
    micro_batch: int
    gradient_checkpointing: bool
    # Trained share of all parameters; None: the recipe's.
    budget: float | None = None

    @property
    def name(self) -> str:
        """Of the job, whatever curve it is in."""
        values = dataclasses.asdict(self)
        del values["curve"]
        return " ".join(f"{key}={value}" for key, value in values.items())

    def changes(self) -> dict[str, Any]:
        """Fields of the job beside what the config says."""
        method = "smt" if self.method == "smt-nf4" else self.method
        found = peer_changes(method, str(described(self.model).get("model_type")))
        if self.method == "smt-nf4":
            found |= {"quantization": "nf4", "double_quantization": True, "placement": "delta"}
        return found | {
            "stage": self.stage,
            "length": self.length,
            "micro_batch": self.micro_batch,
            "gradient_checkpointing": self.gradient_checkpointing,
            # Whatever the number of ranks, a step is one micro-batch on each.
            "accumulation": 1,
        }


def points_of(config: StudyConfig) -> Iterator[Point]:
    """All points but the frontier's, which are searched for; those that can be trained."""
    return (point for point in _all_points(config) if can_be_trained(point.method, point.stage))


def can_be_trained(method: str, stage: int) -> bool:
    """Whether a method goes with a stage: stage 3 would cut a quantized base's packed numbers into shards."""
    return stage < 3 or method not in ("qlora", "smt-nf4")


def _all_points(config: StudyConfig) -> Iterator[Point]:
    base = Point(
        curve="",
        model=config.base.model,
        method="smt",
        world_size=config.base.world_size,
        stage=config.base.stage,
        length=config.base.length,
        micro_batch=config.base.micro_batch,
        gradient_checkpointing=config.base.gradient_checkpointing,
    )
    for method in config.methods:
        own = dataclasses.replace(base, method=method)
        for stage in config.stages:
            for world_size in config.world_sizes:
                yield dataclasses.replace(own, curve="world_size", stage=stage, world_size=world_size)
        for length in config.lengths:
            for checkpointing in (True, False):
                yield dataclasses.replace(own, curve="length", length=length, gradient_checkpointing=checkpointing)
        for samples in config.micro_batches:
            yield dataclasses.replace(own, curve="micro_batch", micro_batch=samples)
        if method != "full":
            for budget in config.budgets:
                if method == "diablo" and budget < _LEAST_DIABLO:
                    continue
                yield dataclasses.replace(own, curve="budget", budget=budget)
        for model in config.models:
            for stage in (2, 3):
                yield dataclasses.replace(own, curve="model", model=model, stage=stage)
    headline = config.headline
    for model in headline.models:
        for method in ("smt", "full"):
            for checkpointing in (True, False):
                for stage in headline.stages:
                    for world_size in headline.world_sizes:
                        yield dataclasses.replace(
                            base,
                            curve="headline",
                            model=model,
                            method=method,
                            stage=stage,
                            world_size=world_size,
                            length=headline.length,
                            micro_batch=headline.micro_batch,
                            gradient_checkpointing=checkpointing,
                        )


def is_simulated(point: Point, config: StudyConfig) -> bool:
    """Whether the config asks for a simulation of the point."""
    wanted = config.simulate
    if point.curve == "headline":
        return point.world_size in wanted.headline_world_sizes
    if point.method not in wanted.methods:
        return False
    if point.curve == "length" and not point.gradient_checkpointing:
        return False
    if point.curve == "world_size" and point.stage not in (2, 3):
        return False
    axes = {
        "world_size": wanted.world_sizes,
        "length": wanted.lengths,
        "micro_batch": wanted.micro_batches,
        "budget": wanted.budgets,
        "model": wanted.models,
    }
    return getattr(point, point.curve) in axes[point.curve]


def _with_budget(config: RunConfig, method: str, budget: float) -> RunConfig:
    """The recipe with another share of the parameters: regions compete for it, and DiaBlo's blocks become as large."""
    mapping: dict[str, Any] = parse_yaml(resolved_yaml(config), "the recipe")
    selection = mapping["selection"]
    if method == "diablo":
        # N blocks on the diagonal of an N x N grid are one Nth of a matrix.
        sides = max(round(1 / budget), 1)
        for region in selection["regions"]:
            region.update(blocks_per_side=sides, per_matrix=sides)
    else:
        for region in selection["regions"]:
            if method != "mixed":
                region["per_matrix"] = None
        selection["budget"] = {"fraction": budget}
        if selection["score"] in ("first", "diagonal"):
            selection["score"] = "random"
    return parse_config(mapping)


class Forecasts:
    """The closed form of points: the shapes of a model and the regions of a selection are made once."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str, float | None], PlannedRun] = {}

    def run(self, point: Point) -> PlannedRun:
        """The planned run of a point."""
        key = (point.model, point.method, point.budget)
        if key not in self._runs:
            shapes = next((run.shapes for (model, *_), run in self._runs.items() if model == point.model), None)
            config = config_of_point(point)
            made = plan_run(config, 1) if shapes is None else PlannedRun(config=config, world_size=1, shapes=shapes)
            self._runs[key] = made
        changes = point.changes()
        if point.budget is not None and point.method in PEERS:
            shape = self._runs[key].shapes.shape
            targets = [each for each in shape.linears if each.name.rpartition(".")[2] in changes["lora_targets"]]
            per_rank = shape.num_layers * sum(each.out_features + each.in_features for each in targets)
            changes["lora_rank"] = max(round(point.budget * shape.num_parameters / per_rank), 1)
        return self._runs[key].but(world_size=point.world_size, **changes)

    def row(self, point: Point) -> dict[str, Any]:
        """One line of the study's table, without a simulation."""
        run = self.run(point)
        forecast = run.forecast
        peak = forecast.peak()
        phases = {f"{phase}_bytes": forecast.peak(phase).num_bytes() for phase in forecast.phases()}
        return {
            **dataclasses.asdict(point),
            "parameters": run.shapes.shape.num_parameters,
            "trained": run.num_trained,
            "peak_bytes": peak.num_bytes(),
            "peak_phase": peak.phase,
            "training_bytes": max(phases[f"{phase}_bytes"] for phase in TRAINING if f"{phase}_bytes" in phases),
            **phases,
            **{f"{kind}_at_peak_bytes": num_bytes for kind, num_bytes in peak.by_kind().items()},
        }


def config_of_point(point: Point) -> RunConfig:
    """The run's config; what :meth:`Point.changes` changes is not in it."""
    method = "smt" if point.method == "smt-nf4" else point.method
    config = default_run(point.model, method)
    if point.budget is not None and point.method not in PEERS:
        config = _with_budget(config, point.method, point.budget)
    return config


def simulated_columns(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a simulation adds to a line of the table."""
    phases = {f"simulated_{phase}_bytes": peak["peak_bytes"] for phase, peak in found["phases"].items()}
    return {"simulated_peak_bytes": found["peak_bytes"], **phases}
