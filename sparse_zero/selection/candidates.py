"""Which regions of which weights may be chosen: patterns resolved against a real model, and checked?"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from sparse_zero.errors import InputError
from sparse_zero.module_map import Matrix, ModuleMap, layer_index, role_from_name, weight_name
from sparse_zero.selection.config import KINDS, Kind, Pick, RegionConfig, SelectionConfig
from sparse_zero.selection.regions import BlockShape, WeightSelection, grid_shape


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """All regions of one kind in one weight: what scores are computed for."""

    # The parameter they lie in, and which matrix of it, if it is a stack of them.
    matrix: Matrix
    slice_index: int | None
    kind: Kind
    # Height and width of the blocks; (0, 0) for rows and columns.
    block_shape: BlockShape
    score: str
    pick: Pick
    # Number fixed for this weight, or None where the regions compete for the budget.
    per_matrix: int | None

    @property
    def module(self) -> str:
        """Name of the module that owns the weight."""
        return self.matrix.module

    @property
    def weight(self) -> str:
        """Name of the weight in a selection."""
        return weight_name(self.matrix.parameter, self.slice_index)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.matrix.shape

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the regions' scores: (grid rows, grid columns) for blocks, (number,) otherwise."""
        if self.kind == "block":
            return grid_shape(self.shape, self.block_shape)
        return (self.shape[0],) if self.kind == "row" else (self.shape[1],)

    @property
    def num_regions(self) -> int:
        """Number of candidate regions."""
        return math.prod(self.grid)

    def sizes(self) -> Tensor:
        """Entries of every region, ragged edges considered: fp64, in the shape of the scores."""
        if self.kind == "block":
            height, width = self.block_shape
            heights = torch.full((self.grid[0],), float(height), dtype=torch.float64)
            widths = torch.full((self.grid[1],), float(width), dtype=torch.float64)
            heights[-1] -= -self.shape[0] % height
            widths[-1] -= -self.shape[1] % width
            return heights.unsqueeze(1) * widths
        other = self.shape[1] if self.kind == "row" else self.shape[0]
        return torch.full(self.grid, float(other), dtype=torch.float64)

    def sums(self, matrix_OI: Tensor) -> Tensor:
        """Sum of a dense [out, in] matrix over every region: fp64, in the shape of the scores."""
        if self.kind == "row":
            return matrix_OI.sum(1, dtype=torch.float64)
        if self.kind == "column":
            return matrix_OI.sum(0, dtype=torch.float64)
        height, width = self.block_shape
        return strip_sums(strip_sums(matrix_OI, width).T, height).T


def strip_sums(tensor_TF: Tensor, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[T, F] summed over strips of ``size`` along F, the last one ragged: [T, ceil(F / size)] in ``dtype``."""
    num_tokens, features = tensor_TF.shape
    number = features // size
    sums = tensor_TF[:, : number * size].reshape(num_tokens, number, size).sum(2, dtype=dtype)
    if number * size == features:
        return sums
    return torch.cat([sums, tensor_TF[:, number * size :].sum(1, keepdim=True, dtype=dtype)], dim=1)


def expand_braces(pattern: str) -> list[str]:
    """Every alternative of ``{a,b}`` groups: ``*.{q,k}_proj`` gives ``*.q_proj`` and ``*.k_proj``."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [full for option in match.group(1).split(",") for full in expand_braces(head + option + tail)]


def match_names(patterns: Sequence[str], names: Sequence[str], field: str, what: str) -> list[str]:
    """The names that match, in their order.

    Args:
        patterns: shell style, with {a,b} alternatives.
        names: what there is.
        field: of the config, for the error: ``selection.regions.modules``.
        what: what the names stand for, for the error: ``matrix``.

    Raises:
        InputError: an alternative of a pattern matches no name.
    """
    matched: set[str] = set()
    for pattern in patterns:
        for alternative in expand_braces(pattern):
            found = [name for name in names if fnmatchcase(name, alternative)]
            if not found:
                endings = sorted({name.rpartition(".")[2] for name in names})
                near = difflib.get_close_matches(alternative.rpartition(".")[2], endings, n=1)
                hint = f"did you mean '*.{near[0]}'?" if near else f"names end in {', '.join(endings)}"
                raise InputError(f"{field} pattern {alternative!r} matches no {what}: {hint}")
            matched.update(found)
    return [name for name in names if name in matched]


def match_matrices(patterns: Sequence[str], module_map: ModuleMap, field: str) -> list[Matrix]:
    """The matrices that match by any of their names, in the order of the model."""
    names = [name for matrix in module_map.matrices for name in matrix.names()]
    matched = set(match_names(patterns, names, field, "matrix"))
    return [matrix for matrix in module_map.matrices if matched.intersection(matrix.names())]


def _layer_bounds(region: RegionConfig, num_layers: int) -> tuple[int, int]:
    low = 0 if region.min_layer is None else region.min_layer
    high = num_layers - 1 if region.max_layer is None else region.max_layer
    for name, value in (("min_layer", region.min_layer), ("max_layer", region.max_layer)):
        if value is not None and not -num_layers <= value < num_layers:
            raise InputError(
                f"selection.regions.{name} is {value}: the model has layers 0 to {num_layers - 1} "
                f"(or -{num_layers} to -1)"
            )
    return (low + num_layers if low < 0 else low), (high + num_layers if high < 0 else high)


def _in_layers(region: RegionConfig, names: Sequence[str], module_map: ModuleMap) -> set[str]:
    """The names that lie in the layers that ``region`` asks for."""
    if region.min_layer is None and region.max_layer is None:
        return set(names)
    low, high = _layer_bounds(region, module_map.num_layers)
    found = {name for name in names if low <= (-1 if (at := module_map.layer_of.get(name)) is None else at) <= high}
    if not found:
        raise InputError(
            f"selection.regions has no layer between min_layer {low} and max_layer {high} for "
            f"{', '.join(region.modules)}: widen it"
        )
    return found


def depth_of(names: Iterable[str], module_map: ModuleMap) -> int:
    """The layer that backward must reach to train what has these names, the lowest of them.

    -1 is below all layers (embeddings, a head tied to one), their number above them (final norm, head).

    Args:
        names: of one matrix or vector, or of the parameter that holds it; at least one.
        module_map: tells layers and roles; names that it does not have tell their own.
    """
    found = []
    for name in names:
        layer = module_map.layer_of.get(name, layer_index(name))
        if layer is None:
            role = module_map.role_of.get(name) or role_from_name(name)
            layer = -1 if role == "embedding" else module_map.num_layers
        found.append(layer)
    return min(found)


def lowest_candidate(min_depth: float, num_layers: int) -> int:
    """The lowest layer that ``selection.min_depth`` lets be trained; -1: the embeddings may be, too."""
    # 0.07 * 100 is 7.000000000000001: the share is meant as written.
    return math.ceil(min_depth * num_layers - 1e-9) if min_depth else -1


def _names(matrices: Iterable[Matrix]) -> list[str]:
    return [name for matrix in matrices for name in matrix.names()]


def _check_depth(region: RegionConfig, kept: Sequence[str], left: Sequence[str], config: SelectionConfig) -> None:
    """Raise where ``selection.min_depth`` leaves nothing of what a pattern names."""
    for pattern in region.modules:
        for alternative in expand_braces(pattern):
            fits = [name for name in left if fnmatchcase(name, alternative)]
            if fits and not any(fnmatchcase(name, alternative) for name in kept):
                raise InputError(
                    f"selection.min_depth is {config.min_depth:g}, below which lies all that selection.regions.modules "
                    f"pattern {alternative!r} matches ({fits[0]}): lower it, or take the pattern out"
                )


def _block_shape(region: RegionConfig, matrix: Matrix) -> BlockShape:
    """Height and width of a region's blocks in a matrix; (0, 0) for other kinds."""
    if region.kind != "block":
        return (0, 0)
    if region.blocks_per_side is not None:
        if region.blocks_per_side > min(matrix.shape):
            raise InputError(
                f"selection.regions.blocks_per_side is {region.blocks_per_side}, more than a side of {matrix.name!r} "
                f"({matrix.shape[0]}x{matrix.shape[1]}): use at most {min(matrix.shape)}"
            )
        return grid_shape(matrix.shape, region.blocks_per_side)
    size = region.block_size or 0
    if size > min(matrix.shape):
        raise InputError(
            f"selection.regions.block_size is {size}, larger than the weight of {matrix.name!r} "
            f"({matrix.shape[0]}x{matrix.shape[1]}): use at most {min(matrix.shape)}"
        )
    return (size, size)


def find_candidates(config: SelectionConfig, module_map: ModuleMap) -> list[Candidates]:
    """Everything that ``config`` lets compete or fixes by number, sorted by weight name, then kind.

    What is of kind whole is not among them: see :func:`find_whole`.

    Raises:
        InputError: a pattern that matches nothing (above ``min_depth``), no layer left, a block larger than a matrix,
            more regions per matrix than there are, or one weight and kind in two families.
    """
    found: dict[tuple[str, Kind], Candidates] = {}
    lowest = lowest_candidate(config.min_depth, module_map.num_layers)
    for region in config.regions:
        if region.kind == "whole":
            continue
        matrices = match_matrices(region.modules, module_map, "selection.regions.modules")
        inside = _in_layers(region, _names(matrices), module_map)
        matrices = [matrix for matrix in matrices if inside.intersection(matrix.names())]
        above = [matrix for matrix in matrices if depth_of(matrix.names(), module_map) >= lowest]
        _check_depth(region, _names(above), _names(matrices), config)
        for matrix in above:
            for slice_index in [None] if matrix.num_slices is None else range(matrix.num_slices):
                candidates = Candidates(
                    matrix=matrix,
                    slice_index=slice_index,
                    kind=region.kind,
                    block_shape=_block_shape(region, matrix),
                    score=config.score_of(region),
                    pick=region.pick,
                    per_matrix=region.per_matrix,
                )
                if region.per_matrix is not None and region.per_matrix > candidates.num_regions:
                    raise InputError(
                        f"selection.regions.per_matrix is {region.per_matrix} but {matrix.name!r} has only "
                        f"{candidates.num_regions} {region.kind} regions: lower it"
                    )
                key = (candidates.weight, candidates.kind)
                if key in found:
                    raise InputError(
                        f"selection.regions names the {region.kind} regions of {matrix.name!r} twice: "
                        "keep one of the families"
                    )
                found[key] = candidates
    return [found[key] for key in sorted(found, key=lambda key: (key[0], KINDS.index(key[1])))]


def head_matrices(module_map: ModuleMap) -> dict[str, Matrix]:
    """The matrices that may be trained entirely, by the names of their parameters: what lies above all layers."""
    return {
        matrix.parameter: matrix
        for matrix in module_map.matrices
        if depth_of(matrix.names(), module_map) == module_map.num_layers
        and module_map.layer_of  # What has no layers has nothing above them.
        and matrix.num_slices is None
        and not matrix.is_quantized
    }


def _match_whole(patterns: Sequence[str], vectors: Sequence[str], matrices: Sequence[str]) -> list[str]:
    """Names of vectors and of matrices; of these only by patterns that name something.

    ``*`` and ``*.weight`` mean all vectors: a language model's head is not trained by the way.
    """
    found: set[str] = set()
    for pattern in patterns:
        names_something = any(letter.isalnum() for letter in pattern.removesuffix("weight"))
        known, what = (
            ([*vectors, *matrices], "vector, and no matrix of a head") if names_something else (vectors, "vector")
        )
        found.update(match_names((pattern,), known, "selection.regions.modules", what))
    return [name for name in (*vectors, *matrices) if name in found]


def find_whole(config: SelectionConfig, module_map: ModuleMap, shapes: Mapping[str, int]) -> dict[str, WeightSelection]:
    """The vectors, and the matrices of a head, that ``config`` trains entirely, by name.

    A matrix is trained as all of its rows. Patterns match the names of parameters: ``classifier.*`` stands for
    ``classifier.weight`` and ``classifier.bias``.

    Args:
        config: regions of kind whole are read.
        module_map: names vectors and matrices.
        shapes: length of each vector, by name.

    Raises:
        InputError: a pattern that matches no vector and no matrix of a head (above ``min_depth``), or no layer left.
    """
    found: dict[str, WeightSelection] = {}
    lowest = lowest_candidate(config.min_depth, module_map.num_layers)
    matrices = head_matrices(module_map)
    for region in config.regions:
        if region.kind == "whole":
            names = _match_whole(region.modules, [*module_map.vectors], [*matrices])
            layers = {name: at for name in names if (at := layer_index(name)) is not None}
            inside = _in_layers(region, names, replace(module_map, layer_of={**module_map.layer_of, **layers}))
            names = [name for name in names if name in inside]
            above = [name for name in names if depth_of([name], module_map) >= lowest]
            _check_depth(region, above, names, config)
            for name in above:
                if name in matrices:
                    shape = matrices[name].shape
                    found[name] = WeightSelection(shape=shape, rows=torch.arange(shape[0]))
                else:
                    found[name] = WeightSelection(shape=(shapes[name], 1), whole=True)
    return found
