"""How much does a region matter: which rules are there, what does each read, and where do others come from?

A rule is a function ``score(regions, *, <needs>)`` of :class:`Candidates`. It returns one number per region, in the
shape ``regions.grid``; higher is better, and -inf means never. It asks for what it needs by the names of its
keyword-only parameters:

    gradient_sums  [grid] fp64: sum over each region of the mean gradient; linear in it, so that no dW is formed
    gradient       [O, I] mean gradient, over all micro-batches (accumulate: sum) or over one (accumulate: per_step;
                   the scores are then averaged over the micro-batches)
    weight         [O, I] the weight
    input_norm     [I] L2 norm of each input channel over all calibration tokens
    output_norm    [O] L2 norm of each output channel over all calibration tokens
    generator      torch.Generator on the host, seeded per weight and kind

In the formulas, n is the number of entries of the region, and sums run over them. g is the mean gradient, w the
weight, x the input norm.
"""

import difflib
import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sparse_zero.errors import InputError
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.config import MATRIX_KINDS, Kind

ENTRY_POINTS = "sparse_zero.scores"
# What a rule may ask for; all but the weight and the generator come out of calibration.
DATA_NEEDS = frozenset({"gradient_sums", "gradient", "input_norm", "output_norm"})
NEEDS = DATA_NEEDS | {"weight", "generator"}
# What to use instead of a built-in rule that does not rank regions of a kind.
_INSTEAD: Mapping[tuple[str, Kind], str] = {
    ("input_norm", "block"): "wanda",
    ("input_norm", "row"): "output_norm or wanda",
    ("output_norm", "block"): "wanda",
    ("output_norm", "column"): "input_norm or wanda",
    ("diagonal", "row"): "first",
    ("diagonal", "column"): "first",
}


@dataclass(frozen=True)
class ScoreRule:
    """A way to score regions, and what it reads."""

    # As the config names it.
    name: str
    # ``function(regions, **needs)`` gives fp64 scores in the shape of ``regions.grid``.
    function: Callable[..., Tensor]
    # Names of its keyword-only parameters.
    needs: frozenset[str]
    # Whether regions of different sizes may be compared as they are: means per entry of |.| or of squares.
    size_neutral: bool = False
    # Region kinds that it ranks.
    kinds: tuple[Kind, ...] = MATRIX_KINDS

    @property
    def needs_data(self) -> bool:
        """Whether calibration data must be read for it."""
        return bool(self.needs & DATA_NEEDS)

    @property
    def needs_gradient(self) -> bool:
        """Whether backward passes are needed for it."""
        return bool(self.needs & {"gradient", "gradient_sums"})


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32, so that squares and products keep their digits."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _sizes(regions: Candidates, like: Tensor) -> Tensor:
    return regions.sizes().to(like.device)


def abs_of_mean(regions: Candidates, *, gradient_sums: Tensor) -> Tensor:
    """|sum g| / n, the absolute value of the mean gradient of the region. SMT, arXiv 2405.15525, section 3.2."""
    return gradient_sums.abs() / _sizes(regions, gradient_sums)


def mean_of_abs(regions: Candidates, *, gradient: Tensor) -> Tensor:
    """sum |g| / n. Entries of opposite sign do not cancel, as they do in SMT's rule (arXiv 2405.15525)."""
    sums = regions.sums(gradient.abs())
    return sums / _sizes(regions, sums)


def l1(regions: Candidates, *, gradient: Tensor) -> Tensor:
    """sum |g|, the L1 norm of the region's gradient; larger regions have more of it."""
    return regions.sums(gradient.abs())


def l2(regions: Candidates, *, gradient: Tensor) -> Tensor:
    """sqrt(sum g^2), the L2 norm of the region's gradient: how fast descent on it lowers the loss."""
    return regions.sums(_wide(gradient).square()).sqrt()


def squared(regions: Candidates, *, gradient: Tensor) -> Tensor:
    """sum g^2 / n; with accumulate: per_step, the mean diagonal of the empirical Fisher information, whose samples
    are the micro-batches (FISH mask, arXiv 2111.09839, section 3.1).
    """
    sums = regions.sums(_wide(gradient).square())
    return sums / _sizes(regions, sums)


def gradient_times_weight(regions: Candidates, *, gradient: Tensor, weight: Tensor) -> Tensor:
    """sum |g w| / n, to first order what the loss changes by when an entry becomes zero. SNIP, arXiv 1810.02340."""
    gradient = _wide(gradient)
    sums = regions.sums((gradient * weight.to(gradient)).abs())
    return sums / _sizes(regions, sums)


def input_norm(regions: Candidates, *, input_norm: Tensor) -> Tensor:
    """The L2 norm of the column's input channel over all tokens: the activation part of wanda, arXiv 2306.11695."""
    return input_norm.double()


def output_norm(regions: Candidates, *, output_norm: Tensor) -> Tensor:
    """The L2 norm of the row's output channel over all tokens: input_norm's counterpart for rows."""
    return output_norm.double()


def magnitude(regions: Candidates, *, weight: Tensor) -> Tensor:
    """sum |w| / n, magnitude pruning's score (arXiv 1506.02626) averaged over the region."""
    sums = regions.sums(weight.abs())
    return sums / _sizes(regions, sums)


def wanda(regions: Candidates, *, weight: Tensor, input_norm: Tensor) -> Tensor:
    """sum |w_oi| x_i / n, Wanda's score (arXiv 2306.11695, section 3) averaged over the region, as RoCoFT ranks rows
    and columns in its ablation (arXiv 2410.10075).
    """
    weight = _wide(weight)
    sums = regions.sums(weight.abs() * input_norm.to(weight))
    return sums / _sizes(regions, sums)


def random(regions: Candidates, *, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), of a seed for every weight and kind: what any other score has to beat."""
    return torch.rand(regions.grid, dtype=torch.float64, generator=generator)


def first(regions: Candidates) -> Tensor:
    """1 - index / number, falling with the index: the first r rows or columns of RoCoFT, arXiv 2410.10075."""
    number = regions.num_regions
    return (1.0 - torch.arange(number, dtype=torch.float64) / number).reshape(regions.grid)


def diagonal(regions: Candidates) -> Tensor:
    """Block (i, i) has 1 - i / number of such blocks, every other one -inf: DiaBlo, arXiv 2506.03230."""
    scores = torch.full(regions.grid, -torch.inf, dtype=torch.float64)
    number = min(regions.grid)
    scores.diagonal().copy_(1.0 - torch.arange(number, dtype=torch.float64) / number)
    return scores


def _inspected(name: str, function: Any, *, size_neutral: object = False, kinds: object = None) -> ScoreRule:
    """The rule that ``function`` is, its parameters checked.

    Raises:
        InputError: it is not callable, or its parameters, size_neutral or kinds are not those of a rule.
    """
    what = f"selection.score {name!r}"
    if not callable(function):
        raise InputError(
            f"{what} is of type {type(function).__name__}: name a function score(regions, *, gradient, ...)"
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} does not tell its parameters ({error}): wrap it in a plain function") from error
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) != 1:
        raise InputError(
            f"{what} has {len(positional)} positional parameters ({', '.join(positional) or 'none'}): it takes one, "
            "the regions, and names its needs after a *, as in score(regions, *, gradient)"
        )
    unknown = [
        str(p) for p in parameters if p.name not in positional and (p.kind != p.KEYWORD_ONLY or p.name not in NEEDS)
    ]
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(NEEDS), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"{what} has the parameter {unknown[0]}, which nothing supplies: {hint}a score may need "
            f"{', '.join(sorted(NEEDS))}"
        )
    kinds = MATRIX_KINDS if kinds is None else kinds
    if isinstance(kinds, str) or not isinstance(kinds, Sequence) or not kinds or not set(kinds) <= set(MATRIX_KINDS):
        raise InputError(f"{what} has kinds {kinds!r}: give a tuple of some of {', '.join(MATRIX_KINDS)}")
    if not isinstance(size_neutral, bool):
        raise InputError(f"{what} has size_neutral {size_neutral!r}: give True or False")
    needs = frozenset(p.name for p in parameters if p.kind == p.KEYWORD_ONLY)
    return ScoreRule(name, function, needs, size_neutral, tuple(kinds))


SCORES: Mapping[str, ScoreRule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            _inspected("abs_of_mean", abs_of_mean),
            _inspected("mean_of_abs", mean_of_abs, size_neutral=True),
            _inspected("l1", l1),
            _inspected("l2", l2),
            _inspected("squared", squared, size_neutral=True),
            _inspected("gradient_times_weight", gradient_times_weight, size_neutral=True),
            _inspected("input_norm", input_norm, kinds=("column",)),
            _inspected("output_norm", output_norm, kinds=("row",)),
            _inspected("magnitude", magnitude, size_neutral=True),
            _inspected("wanda", wanda, size_neutral=True),
            # These three do not depend on the region's content, hence on its size.
            _inspected("random", random, size_neutral=True),
            _inspected("first", first, size_neutral=True),
            _inspected("diagonal", diagonal, size_neutral=True, kinds=("block",)),
        )
    }
)


def _imported(name: str) -> Any:
    """What ``package.module:function`` names.

    Raises:
        InputError: the module cannot be imported, or has no such attribute.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # Whatever a user's module raises while it is imported.
        raise InputError(
            f"selection.score is {name!r}, and importing {module!r} failed with {type(error).__name__}: {error}; "
            "install it, or put its folder on PYTHONPATH"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, vars(found), n=1)
            raise InputError(
                f"selection.score is {name!r}, and {module!r} has no {attribute!r}: "
                + (f"did you mean {near[0]!r}?" if near else "define it there")
            )
        found = getattr(found, part)
    return found


def _loaded(name: str, found: Sequence[EntryPoint]) -> Any:
    """What the only entry point of a name stands for."""
    if len({point.value for point in found}) > 1:
        raise InputError(
            f"selection.score is {name!r}, which several packages provide ({', '.join(p.value for p in found)}): "
            "name one of these instead"
        )
    try:
        return found[0].load()
    except Exception as error:  # Whatever a user's package raises while it is imported.
        raise InputError(
            f"selection.score is {name!r}, an entry point for {found[0].value}, and loading it failed with "
            f"{type(error).__name__}: {error}; install that package again"
        ) from error


def resolve_score(name: str) -> ScoreRule:
    """The rule of a name.

    Args:
        name: a built-in rule, an entry point of the group ``sparse_zero.scores`` (of an installed package), or
            ``package.module:function``; looked for in this order. Such a function may have the attributes
            ``size_neutral`` (default False: its scores are normalised within each kind before kinds compete) and
            ``kinds`` (default all: a tuple of block, row, column).

    Raises:
        InputError: there is no such rule, it cannot be imported, or its parameters are not those of a rule.
    """
    if name in SCORES:
        return SCORES[name]
    if ":" in name:
        function = _imported(name)
    else:
        points = entry_points(group=ENTRY_POINTS)
        found = [point for point in points if point.name == name]
        if not found:
            known = [*SCORES, *sorted(point.name for point in points)]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}."
            raise InputError(
                f"selection.score is {name!r}: {hint} Name a function of yours as 'package.module:function'"
            )
        function = _loaded(name, found)
    return _inspected(
        name,
        function,
        size_neutral=getattr(function, "size_neutral", False),
        kinds=getattr(function, "kinds", None),
    )


def generator_for(candidates: Candidates, seed: int) -> torch.Generator:
    """A generator on the host whose seed depends on ``seed``, the weight and the kind alone."""
    key = f"{seed}/{candidates.weight}/{candidates.kind}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "little"))


def check_rule(rule: ScoreRule, candidates: Candidates) -> None:
    """Raise if ``rule`` cannot rank ``candidates``; reads no data and no weights.

    Raises:
        InputError: it does not rank this kind, reads what a quantized weight or this module does not give, or
            excludes more regions than per_matrix leaves.
    """
    kind, matrix = candidates.kind, candidates.matrix
    if kind not in rule.kinds:
        instead = _INSTEAD.get((rule.name, kind), "another score")
        ranked = " and ".join(f"{each}s" for each in rule.kinds)
        raise InputError(
            f"selection.score {rule.name} ranks {ranked} only, and selection.regions has {kind}s of {matrix.name!r}: "
            f"use {instead} for {kind}s"
        )
    # Where X and dY are seen, the gradient is formed from them; codes have none of their own.
    reads_gradient = rule.needs_gradient and not matrix.is_product
    if matrix.is_quantized and (reads_gradient or ("weight" in rule.needs and not matrix.is_linear)):
        missing = "gradient" if reads_gradient else "weight in full precision"
        remedy = "leave it out of selection.regions.modules" if reads_gradient else "use a score of the gradient"
        raise InputError(
            f"selection.score {rule.name} reads the {missing} of {matrix.name!r}, which is quantized, and not in a "
            f"linear of bitsandbytes: {remedy}, or load the base in full precision"
        )
    if not matrix.is_product and rule.needs & {"input_norm", "output_norm"}:
        raise InputError(
            f"selection.score {rule.name} reads the activations of {matrix.name!r}, which is not the weight of a "
            "linear module of its own: use a score of its gradient there, such as mean_of_abs"
        )
    if rule.name == "diagonal" and (candidates.per_matrix or 0) > min(candidates.grid):
        raise InputError(
            f"selection.regions.per_matrix is {candidates.per_matrix} and the diagonal of {matrix.name!r} has only "
            f"{min(candidates.grid)} blocks: lower it"
        )


def checked_scores(scores: object, candidates: Candidates) -> Tensor:
    """What a rule returned, as fp64 on the host.

    Raises:
        InputError: it is no tensor, of another shape than ``candidates.grid``, not real, or has NaN or +inf in it.
    """
    what = f"selection.score {candidates.score} of the {candidates.kind}s of {candidates.weight}"
    if not isinstance(scores, Tensor):
        raise InputError(f"{what} is of type {type(scores).__name__}: return a tensor with a number per region")
    if tuple(scores.shape) != candidates.grid:
        raise InputError(
            f"{what} has the shape {tuple(scores.shape)}: return a number per region, {candidates.grid} (regions.grid)"
        )
    if scores.is_complex():
        raise InputError(f"{what} is complex: return real numbers")
    scores = scores.detach().to("cpu", torch.float64)
    if bool((scores < torch.inf).all()):
        return scores
    for name, wrong in (("NaN", scores.isnan()), ("+inf", scores.isposinf())):
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            raise InputError(
                f"{what} is {name} for {int(wrong.sum()):,} of {scores.numel():,} regions, first at {at}: "
                "return finite numbers, or -inf for regions that must not be chosen"
            )
    return scores


def check_reached(
    rules: Mapping[str, ScoreRule], candidates: Sequence[Candidates], reached: Mapping[str, bool]
) -> None:
    """Raise if a parameter whose gradient is read by a score had none but zeros.

    One matrix of a stack may have none: an expert that no token was routed to is simply never the best.

    Args:
        rules: by the names in ``candidates``.
        candidates: that were scored.
        reached: whether a gradient other than zero came by, by weight.

    Raises:
        InputError: names the module.
    """
    found: dict[str, bool] = {}
    for each in candidates:
        if rules[each.score].needs_gradient:
            name = each.matrix.name
            found[name] = found.get(name, False) or reached[each.weight]
    for name, was in found.items():
        if not was:
            raise InputError(
                f"no gradient reached {name!r} during calibration: leave it out of selection.regions.modules, or "
                "calibrate on data that use it"
            )
