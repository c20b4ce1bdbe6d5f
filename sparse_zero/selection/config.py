"""Which regions may be selected, by which score, under which budget?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from sparse_zero.errors import InputError

Kind = Literal["block", "row", "column", "whole"]
Pick = Literal["max", "min", "mixed"]
CalibrationWeights = Literal["frozen", "full"]
Accumulate = Literal["sum", "per_step"]
Moments = Literal["zero", "mean"]
AccumulatorDtype = Literal["float32", "float64"]

# In the order of ownership: an entry that several regions cover belongs to the first of these kinds.
KINDS: tuple[Kind, ...] = get_args(Kind)
MATRIX_KINDS: tuple[Kind, ...] = ("block", "row", "column")
PICKS: tuple[Pick, ...] = get_args(Pick)


def _check_whole_numbers(section: str, config: object, *names: str) -> None:
    """Raise unless the fields of these names are integers, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise InputError(f"{section}.{name} is {value!r}: it must be a whole number")


def check_patterns(field: str, patterns: object) -> None:
    """Raise unless there are several patterns, or one in a tuple: a text alone would be read letter by letter."""
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise InputError(f"{field} is {patterns!r}: give a tuple of patterns, such as ('*.q_proj',)")
    if not patterns:
        raise InputError(f"{field} is empty: name at least one pattern, such as '*.q_proj'")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise InputError(f"{field} has {pattern!r} in it: a pattern is a text, such as '*.q_proj'")


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """One family of candidate regions: a kind, on the matrices that the patterns match."""

    # block: a sub-matrix of a grid (SMT, DiaBlo); row: an output channel; column: an input channel (RoCoFT);
    # whole: biases, norms and the matrices of a head (what lies above all layers: a classifier), trained entirely.
    # Such a matrix is trained as all of its rows, by whose settings of per_kind.
    kind: Kind
    # Patterns over names, shell style, with {a,b} alternatives: "*.self_attn.{q,k,v}_proj". A matrix that is the
    # weight of a module has the module's name; experts have their parameter's ("*.experts.down_proj"), and so do
    # what is of kind whole ("*.input_layernorm.weight", "*.q_proj.bias", "classifier.*").
    modules: tuple[str, ...]
    # Side of a block, in rows and columns of the matrix. Blocks only: rows and columns have no size.
    block_size: int | None = None
    # Instead of block_size: cut every matrix into this many strips along either side; the blocks are then as
    # oblong as the matrix (DiaBlo).
    blocks_per_side: int | None = None
    # Only layers from this index on; negative numbers count from the last layer (-1). None: from the first.
    min_layer: int | None = None
    # Only layers up to this index, itself among them; negative numbers as above. None: up to the last.
    max_layer: int | None = None
    # Exactly this many regions in every matched matrix, outside the competition for the budget.
    # None: the regions compete under the budget. What is of kind whole never competes: it is always trained.
    per_matrix: int | None = None
    # Score of these regions; None: the selection's.
    score: str | None = None
    # Which end of the ranking is taken: the highest scores, the lowest, or half of each (RoCoFT's ablation).
    pick: Pick = "max"

    def __post_init__(self) -> None:
        check_patterns("selection.regions.modules", self.modules)
        _check_whole_numbers(
            "selection.regions", self, "block_size", "blocks_per_side", "min_layer", "max_layer", "per_matrix"
        )
        named = ", ".join(self.modules)
        if self.kind not in KINDS:
            raise InputError(f"selection.regions.kind is {self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.kind == "block" and (self.block_size is None) == (self.blocks_per_side is None):
            raise InputError(
                f"selection.regions.block_size is {self.block_size} and blocks_per_side {self.blocks_per_side} "
                f"for the blocks of {named}: set exactly one of them (SMT uses block_size 256)"
            )
        for name in ("block_size", "blocks_per_side"):
            value = getattr(self, name)
            if value is not None and self.kind != "block":
                raise InputError(
                    f"selection.regions.{name} is {value} for kind {self.kind!r} of {named}: "
                    "only blocks have a size; remove it"
                )
            if value is not None and value < 1:
                raise InputError(f"selection.regions.{name} is {value} for {named}: blocks need a positive size")
        if self.per_matrix is not None and self.per_matrix < 1:
            raise InputError(
                f"selection.regions.per_matrix is {self.per_matrix} for {named}: give a positive number of regions"
            )
        if self.pick not in PICKS:
            raise InputError(f"selection.regions.pick is {self.pick!r} for {named}: choose one of {', '.join(PICKS)}")
        if self.kind == "whole":
            for name, value, default in (
                ("score", self.score, None), ("per_matrix", self.per_matrix, None), ("pick", self.pick, "max"),
            ):  # fmt: skip
                if value != default:
                    raise InputError(
                        f"selection.regions.{name} is {value!r} for kind 'whole' of {named}: "
                        "what is trained entirely has no scores; remove it"
                    )


@dataclass(frozen=True, kw_only=True)
class BudgetGroupConfig:
    """A part of the budget that is reserved for some of the matrices."""

    # Patterns over names, as in regions: "*.self_attn.*".
    modules: tuple[str, ...]
    # Share of the budget; the shares of all groups add up to 1.
    share: float

    def __post_init__(self) -> None:
        check_patterns("selection.budget.groups.modules", self.modules)
        if not 0.0 < self.share <= 1.0:
            raise InputError(
                f"selection.budget.groups.share is {self.share} for {', '.join(self.modules)}: it must lie in (0, 1]"
            )


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How much may be trained, over all regions together. Exactly one of the first four fields is set.

    What is of kind whole and regions with per_matrix come first, and count (in regions: one each). The fields after
    these four divide what they leave. An amount that does not hold one region is an error.
    """

    # Share of all parameters of the model, tied ones counted once; 0 < fraction <= 1.
    fraction: float | None = None
    # Number of trained entries.
    parameters: int | None = None
    # Bytes of training state over all ranks together: values, gradients, fp32 masters, two fp32 moments.
    bytes: int | None = None
    # Number of regions, whatever their size.
    regions: int | None = None
    # all: one ranking over all matrices (SMT calls it no_restriction); matrix: every matrix (of a stack of experts:
    # every one of them) gets the same part (SMT's norm_dist).
    over: Literal["all", "matrix"] = "all"
    # The budget split over groups of matrices, each with a ranking of its own; every competing matrix is in
    # exactly one group. What one group cannot use, no other gets. Empty: no groups.
    groups: tuple[BudgetGroupConfig, ...] = ()
    # At least this share of the budget (of a group's, with groups), up to less than one region, in every layer with
    # candidates. The floors are filled first, each by the layer's own ranking. Matrices outside the layers are not
    # bound. None: no floor.
    min_share_per_layer: float | None = None
    # At most this share, likewise; a layer at its cap is passed over. None: no cap.
    max_share_per_layer: float | None = None

    def __post_init__(self) -> None:
        amounts = {name: getattr(self, name) for name in ("fraction", "parameters", "bytes", "regions")}
        given = [name for name, value in amounts.items() if value is not None]
        if len(given) != 1:
            shown = ", ".join(f"{name}={value}" for name, value in amounts.items())
            raise InputError(f"selection.budget has {shown}: set exactly one")
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise InputError(
                f"selection.budget.fraction is {self.fraction}: it must lie in (0, 1], 0.01 is one percent"
            )
        _check_whole_numbers("selection.budget", self, "parameters", "bytes", "regions")
        for name in ("parameters", "bytes", "regions"):
            if amounts[name] is not None and amounts[name] < 1:
                raise InputError(f"selection.budget.{name} is {amounts[name]}: it must be at least 1")
        if self.over not in ("all", "matrix"):
            raise InputError(f"selection.budget.over is {self.over!r}: choose one of all, matrix")
        low, high = self.min_share_per_layer, self.max_share_per_layer
        for name, value in (("min_share_per_layer", low), ("max_share_per_layer", high)):
            if value is not None and not 0.0 < value <= 1.0:
                raise InputError(f"selection.budget.{name} is {value}: it must lie in (0, 1]")
            if value is not None and self.over == "matrix":
                raise InputError(
                    f"selection.budget.{name} is {value} and over is 'matrix', which gives all matrices the same: "
                    "set only one of them"
                )
        if low is not None and high is not None and low > high:
            raise InputError(
                f"selection.budget.min_share_per_layer is {low}, more than max_share_per_layer {high}: lower it"
            )
        total = sum(group.share for group in self.groups)
        if self.groups and abs(total - 1.0) > 1e-6:
            raise InputError(f"selection.budget.groups have shares that add up to {total:g}: make them add up to 1")


@dataclass(frozen=True, kw_only=True)
class FullCalibrationConfig:
    """SMT's calibration: real full fine-tuning on the calibration data, scored meanwhile.

    AdamW with a constant learning rate, betas 0.9 and 0.999, epsilon 1e-8, no decay, no clipping.
    """

    # AdamW's learning rate; SMT uses 9.65e-6 to 1e-4.
    learning_rate: float = 1e-5
    # Micro-batches of one optimizer step over all ranks together; every world size must divide it.
    batches_per_step: int = 4
    # ZeRO stage of these steps: 2 keeps the weights on every rank, 3 shards them too.
    stage: Literal[2, 3] = 2
    # Keep masters and moments (and the weights, at stage 3) in host memory.
    offload: bool = False
    # A new base folder that a run writes the trained weights to, with tokenizer and config, and that training starts
    # from; it must be empty or not exist. None: the weights are restored to what they were.
    keep_weights_in: str | None = None

    def __post_init__(self) -> None:
        _check_whole_numbers("selection.full_calibration", self, "batches_per_step")
        if self.learning_rate <= 0.0:
            raise InputError(f"selection.full_calibration.learning_rate is {self.learning_rate}: it must be positive")
        if self.batches_per_step < 1:
            raise InputError(
                f"selection.full_calibration.batches_per_step is {self.batches_per_step}: it must be at least 1"
            )
        if self.stage not in (2, 3):
            raise InputError(f"selection.full_calibration.stage is {self.stage!r}: choose 2 or 3")
        if self.keep_weights_in is not None and not self.keep_weights_in.strip():
            raise InputError(
                f"selection.full_calibration.keep_weights_in is {self.keep_weights_in!r}: name a folder, or "
                "leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class ReselectConfig:
    """When the selection is made anew during training, and how what is new begins."""

    # Optimizer steps between two checks. A check scores the model as it is then, on other calibration data each time,
    # and always with frozen weights.
    every: int
    # Select anew only if the current selection captures less than this share of the score of all candidates.
    # None: at every check. The regions are then the ones of the highest scores (pick: max).
    captured_below: float | None = None
    # No check after this step; entries that become trained near the end have little time. None: up to the last.
    until: int | None = None
    # Micro-batches of calibration data per check; None: selection.calibration_batches.
    calibration_batches: int | None = None
    # Adam's moments of entries that become trained. The step counter goes on, so that bias correction is over: with
    # a zero second moment, the first update of an entry is up to (1 - beta1) / sqrt(1 - beta2) = 3.2 learning rates.
    # mean: the second moment starts as the mean over the kept entries of the same parameter and kind, which makes it
    # a tenth of a typical update instead; zero: both start at zero, which learned faster where it was measured.
    moments: Moments = "zero"

    def __post_init__(self) -> None:
        _check_whole_numbers("selection.reselect", self, "every", "until", "calibration_batches")
        for name in ("every", "until", "calibration_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"selection.reselect.{name} is {value}: it must be at least 1")
        if self.until is not None and self.until < self.every:
            raise InputError(
                f"selection.reselect.until is {self.until} and every {self.every}: no check would ever come; raise "
                "until, or lower every"
            )
        if self.captured_below is not None and not 0.0 < self.captured_below <= 1.0:
            raise InputError(f"selection.reselect.captured_below is {self.captured_below}: it must lie in (0, 1]")
        if self.moments not in get_args(Moments):
            raise InputError(f"selection.reselect.moments is {self.moments!r}: choose zero or mean")

    def is_due(self, step: int) -> bool:
        """Whether a check comes after ``step`` optimizer steps."""
        return step > 0 and step % self.every == 0 and (self.until is None or step <= self.until)


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """What :func:`sparse_zero.select` chooses among, and how."""

    # Candidate families; they may mix kinds and overlap (a block owns an entry before a row, a row before a column).
    regions: tuple[RegionConfig, ...] = ()
    # A selection saved earlier, used as it is instead of regions and budget.
    file: str | None = None
    # Score of families that name none: a built-in one, an entry point of the group sparse_zero.scores, or
    # "module:function". abs_of_mean is SMT's: |mean gradient| over the region.
    score: str = "abs_of_mean"
    # Share of the decoder layers, from the lowest, that hold no candidates, nor do the embeddings then: with 0.5 the
    # layers of the upper half do, the final norm and the head. Backward stops at the lowest trained layer, so this
    # bounds a step's time; where it lies between two layers, the upper one counts. 0: no bound.
    # (min_layer of a family is a number of a layer, and both hold.)
    min_depth: float = 0.0
    # How much score a shorter backward is worth. The lowest layer is chosen that gives the most of
    # (share of the score captured) / (modelled operations of a step) ** depth_tradeoff: with 1, a step of 10% fewer
    # operations is worth 10% of the score. 0: only the score counts.
    depth_tradeoff: float = 0.0
    # Needed when a family competes (has no per_matrix); also an upper bound on everything together.
    budget: BudgetConfig | None = None
    # Micro-batches of calibration data over all ranks together. SMT scores over 100 steps. In the library, all
    # that are passed are read, however many; the selection's metadata have their number.
    calibration_batches: int = 32
    # Samples in one calibration micro-batch: fixed, so that the result does not depend on the world size.
    calibration_batch_size: int = 4
    # frozen: calibration changes nothing; full: SMT's recipe, real full fine-tuning steps (see full_calibration).
    calibration_weights: CalibrationWeights = "frozen"
    # Learning rate, steps and sharding of calibration_weights: full; not read with frozen.
    full_calibration: FullCalibrationConfig = field(default_factory=FullCalibrationConfig)
    # sum: a score reads the gradient summed over all micro-batches. per_step: it reads each micro-batch's
    # gradient, and the scores are averaged.
    accumulate: Accumulate = "sum"
    # Scores that are not linear in the gradient keep, with accumulate: sum, one accumulator per matrix on every
    # rank's host. Its dtype.
    accumulator_dtype: AccumulatorDtype = "float32"
    # A folder to map the accumulators from disk; None: they are held in memory.
    accumulator_folder: str | None = None
    # Seed of the random score and of the calibration order.
    seed: int = 0
    # Select anew during training; None: what is selected before the first step is trained to the end.
    reselect: ReselectConfig | None = None

    def __post_init__(self) -> None:
        _check_whole_numbers("selection", self, "calibration_batches", "calibration_batch_size", "seed")
        for name in ("calibration_batches", "calibration_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"selection.{name} is {getattr(self, name)}: it must be at least 1")
        for name, choices in (
            ("calibration_weights", get_args(CalibrationWeights)),
            ("accumulate", get_args(Accumulate)),
            ("accumulator_dtype", get_args(AccumulatorDtype)),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"selection.{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not 0.0 <= self.min_depth < 1.0:
            raise InputError(
                f"selection.min_depth is {self.min_depth}: it must lie in [0, 1); 0.5 leaves the upper half of layers"
            )
        if not (self.depth_tradeoff >= 0.0 and math.isfinite(self.depth_tradeoff)):
            raise InputError(f"selection.depth_tradeoff is {self.depth_tradeoff}: it must be a number from 0 on")
        if self.file is not None:
            for name in ("min_depth", "depth_tradeoff"):
                if getattr(self, name):
                    raise InputError(
                        f"selection.file is {self.file} and selection.{name} is {getattr(self, name)}, which has "
                        "nothing to choose among: set selection.regions and budget instead of the file, or leave "
                        f"{name} out"
                    )
            if self.regions or self.budget is not None:
                raise InputError(
                    f"selection.file is {self.file} and selection.regions or budget are set too: keep one of them"
                )
            if self.reselect is not None:
                raise InputError(
                    f"selection.file is {self.file} and selection.reselect is set, which has nothing to choose among: "
                    "set selection.regions and budget instead of the file, or leave reselect out"
                )
            return
        if not self.regions:
            raise InputError("selection.regions is empty: name at least one family of regions, or a selection.file")
        competing = [region for region in self.regions if region.per_matrix is None and region.kind != "whole"]
        if competing and self.budget is None:
            raise InputError(
                "selection.budget is missing: regions without per_matrix compete for a budget; "
                "set budget.fraction, parameters, bytes or regions, or per_matrix on every family"
            )
        for what, found in (
            ("score", {self.score_of(region) for region in competing}),
            ("pick", {region.pick for region in competing}),
        ):
            if len(found) > 1:
                raise InputError(
                    f"selection.regions compete under one budget with a different {what} "
                    f"({', '.join(sorted(found))}): give them the same, or fix their number with per_matrix"
                )
        scores = {self.score_of(region) for region in self.regions if region.kind != "whole"}
        if self.depth_tradeoff and not scores:
            raise InputError(
                f"selection.depth_tradeoff is {self.depth_tradeoff}, and selection.regions have no scores to trade: "
                "add a family of another kind than 'whole', or leave depth_tradeoff out"
            )
        # What asks for the share of the score that is captured.
        asking = {
            "reselect.captured_below": self.reselect and self.reselect.captured_below,
            "depth_tradeoff": self.depth_tradeoff,
        }
        for name, value in asking.items():
            if not value:
                continue
            if len(scores) > 1:
                raise InputError(
                    f"selection.{name} is {value}, and selection.regions have several scores "
                    f"({', '.join(sorted(scores))}), of which no common share can be captured: use one score, or leave "
                    f"{name.rpartition('.')[2]} out"
                )
            for region in self.regions:
                if region.pick != "max":
                    raise InputError(
                        f"selection.{name} is {value}, and selection.regions.pick is {region.pick!r} for "
                        f"{', '.join(region.modules)}, which leaves high scores out by design: use pick max, or leave "
                        f"{name.rpartition('.')[2]} out"
                    )
        if self.calibration_weights == "frozen" and self.full_calibration.keep_weights_in is not None:
            raise InputError(
                f"selection.full_calibration.keep_weights_in is {self.full_calibration.keep_weights_in}, and "
                "selection.calibration_weights is 'frozen', which trains no weights: set it to 'full', or leave "
                "keep_weights_in out"
            )
        steps, batches = self.full_calibration.batches_per_step, self.calibration_batches
        if self.calibration_weights == "full" and batches % steps:
            raise InputError(
                f"selection.calibration_batches is {batches}, not a multiple of full_calibration.batches_per_step "
                f"{steps}: make it one"
            )

    @property
    def keeps_weights_in(self) -> str | None:
        """The folder of the base that calibration makes, and training starts from; None if the base stays the same."""
        trains = self.file is None and self.calibration_weights == "full"
        return self.full_calibration.keep_weights_in if trains else None

    def score_of(self, region: RegionConfig) -> str:
        """The score that ranks ``region``: its own, or the selection's."""
        return region.score or self.score

    @property
    def needs_data(self) -> bool:
        """Whether any score reads gradients or activations, so that calibration data are needed.

        Raises:
            InputError: a score that does not exist.
        """
        # Rules rank candidates, which are made from this config.
        from sparse_zero.selection.scores import resolve_score

        names = {self.score_of(region) for region in self.regions if region.kind != "whole"}
        return any(resolve_score(name).needs_data for name in sorted(names))
