"""Which regions may be selected, by which score, under which budget?"""

from dataclasses import dataclass
from typing import Literal, get_args

from sparse_zero.errors import InputError

Kind = Literal["block", "row", "column"]
Score = Literal["abs_of_mean", "mean_of_abs", "random", "first"]

KINDS: tuple[Kind, ...] = get_args(Kind)
SCORES: tuple[Score, ...] = get_args(Score)


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """One family of candidate regions: a kind, on the linears that the patterns match."""

    # block: a size x size sub-matrix (SMT); row: an output channel; column: an input channel (RoCoFT).
    kind: Kind
    # Patterns over module names, shell style, with {a,b} alternatives: "*.self_attn.{q,k,v}_proj".
    modules: tuple[str, ...]
    # Side of a block, in rows and columns of the weight. Blocks only: rows and columns have no size.
    block_size: int | None = None
    # Only layers with min_layer <= index <= max_layer; negative numbers count from the last layer (-1).
    min_layer: int | None = None
    max_layer: int | None = None
    # Exactly this many regions in every matched weight, outside the competition for the budget.
    # None: the regions compete under the budget.
    per_matrix: int | None = None
    # Score of these regions; None: the selection's.
    score: Score | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"selection.regions.kind is {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not self.modules:
            raise InputError("selection.regions.modules is empty: name at least one pattern, such as '*.q_proj'")
        if self.kind == "block" and (self.block_size is None or self.block_size < 1):
            raise InputError(
                f"selection.regions.block_size is {self.block_size}: blocks need a positive size (SMT uses 256)"
            )
        if self.kind != "block" and self.block_size is not None:
            raise InputError(
                f"selection.regions.block_size is {self.block_size} for kind {self.kind!r}: "
                "only blocks have a size; remove it"
            )
        if self.per_matrix is not None and self.per_matrix < 1:
            raise InputError(f"selection.regions.per_matrix is {self.per_matrix}: give a positive number of regions")
        if self.score is not None and self.score not in SCORES:
            raise InputError(f"selection.regions.score is {self.score!r}: choose one of {', '.join(SCORES)}")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How much may be trained, over all competing regions together. Exactly one field is set."""

    # Share of all parameters of the model, tied ones counted once; 0 < fraction <= 1.
    fraction: float | None = None
    # Number of trained entries.
    parameters: int | None = None

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.parameters is None):
            raise InputError(
                f"selection.budget has fraction={self.fraction} and parameters={self.parameters}: set exactly one"
            )
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise InputError(
                f"selection.budget.fraction is {self.fraction}: it must lie in (0, 1], 0.01 is one percent"
            )
        if self.parameters is not None and self.parameters < 1:
            raise InputError(f"selection.budget.parameters is {self.parameters}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """What :func:`sparse_zero.select` chooses among, and how."""

    # Candidate families; they may mix kinds and overlap (a block owns an entry before a row, a row before a column).
    regions: tuple[RegionConfig, ...] = ()
    # A selection saved earlier, used as it is instead of regions and budget.
    file: str | None = None
    # Score of families that name none. abs_of_mean is SMT's: |mean gradient| over the region.
    score: Score = "abs_of_mean"
    # Needed when a family competes (has no per_matrix); also an upper bound on everything together.
    budget: BudgetConfig | None = None
    # Micro-batches of calibration data over all ranks together. SMT scores over 100 steps.
    calibration_batches: int = 32
    # Samples in one calibration micro-batch: fixed, so that the result does not depend on the world size.
    calibration_batch_size: int = 4
    # Seed of the random score and of the calibration order.
    seed: int = 0

    def __post_init__(self) -> None:
        if self.file is not None:
            if self.regions or self.budget is not None:
                raise InputError(
                    f"selection.file is {self.file} and selection.regions or budget are set too: keep one of them"
                )
            return
        if not self.regions:
            raise InputError("selection.regions is empty: name at least one family of regions, or a selection.file")
        if self.score not in SCORES:
            raise InputError(f"selection.score is {self.score!r}: choose one of {', '.join(SCORES)}")
        if self.calibration_batches < 1:
            raise InputError(f"selection.calibration_batches is {self.calibration_batches}: it must be at least 1")
        if self.calibration_batch_size < 1:
            raise InputError(
                f"selection.calibration_batch_size is {self.calibration_batch_size}: it must be at least 1"
            )
        competing = [region for region in self.regions if region.per_matrix is None]
        if competing and self.budget is None:
            raise InputError(
                "selection.budget is missing: regions without per_matrix compete for a budget; "
                "set budget.fraction or budget.parameters, or per_matrix on every family"
            )
        scores = {self.score_of(region) for region in competing}
        if len(scores) > 1:
            raise InputError(
                f"selection.regions compete under one budget with different scores ({', '.join(sorted(scores))}): "
                "give them one score, or fix their number with per_matrix"
            )
        sizes = {region.block_size for region in self.regions if region.kind == "block"}
        if len(sizes) > 1:
            raise InputError(
                f"selection.regions has block sizes {sorted(s for s in sizes if s)}: use one block_size in a selection"
            )

    def score_of(self, region: RegionConfig) -> Score:
        """The score that ranks ``region``: its own, or the selection's."""
        return region.score or self.score

    @property
    def needs_data(self) -> bool:
        """Whether any score reads gradients, so that calibration data are needed."""
        return any(self.score_of(region) in ("abs_of_mean", "mean_of_abs") for region in self.regions)
