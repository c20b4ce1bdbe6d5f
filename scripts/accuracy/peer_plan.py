"""Which parts of a model does a peer train, how many parameters are that, and which rank fits a budget?

Nothing is changed here: the model is looked at, and its names and sizes are told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from models.heads import check_head_trained
from scripts.accuracy.peer_config import ADAPTERS, PeerConfig, PeerMethod
from sparse_zero.errors import InputError
from sparse_zero.module_map import Matrix, ModuleMap
from sparse_zero.selection.candidates import match_matrices, match_names
from sparse_zero.selection.select import num_parameters
from sparse_zero.selection.shares import share_of


@dataclass(frozen=True, kw_only=True)
class Size:
    """How many parameters the adapters of a method have at each rank."""

    per_rank: int
    # Whatever the rank: DoRA's magnitudes.
    fixed: int
    # The largest rank that there is; None: any.
    max_rank: int | None

    def at(self, rank: int) -> int:
        """Parameters of the adapters of a rank."""
        return self.per_rank * rank + self.fixed


@dataclass(frozen=True, kw_only=True)
class PeerPlan:
    """What is trained, by name."""

    method: PeerMethod
    # Modules that have adapters (of trainable_tokens, the embedding); none of full and frozen.
    targets: tuple[str, ...]
    # 0 of full and frozen.
    rank: int
    # Parameters that are trained themselves, without those of the head: of full.
    parameters: tuple[str, ...]
    # Parameters of the head, and the modules that they are all parameters of.
    head: tuple[str, ...]
    head_modules: tuple[str, ...]
    # Trained parameters: of the method, and of the head.
    num_trained: int
    num_head: int


def adapter_size(method: PeerMethod, shapes: Sequence[tuple[int, int]]) -> Size:
    """Of a method on matrices of shapes (out, in); of trainable_tokens, on the embedding (tokens, hidden).

    LoRA has two factors, SHiRA as many entries; DoRA has a magnitude for every output beside the factors.
    """
    if method == "trainable_tokens":
        ((tokens, hidden),) = shapes
        return Size(per_rank=hidden, fixed=0, max_rank=tokens)
    return Size(
        per_rank=sum(rows + columns for rows, columns in shapes),
        fixed=sum(rows for rows, _ in shapes) if method == "dora" else 0,
        max_rank=min(r * c // (r + c) for r, c in shapes) if method == "shira" else None,
    )


def rank_within(size: Size, fraction: float, total: int, what: str) -> int:
    """The largest rank whose adapters have no more parameters than that share of the model.

    Args:
        size: of the adapters.
        fraction: of the model's parameters.
        total: the model's parameters.
        what: is sized, for errors: ``rank of lora``.

    Raises:
        InputError: rank 1 is more than that, or the largest rank is less.
    """
    budget = share_of(fraction, total)
    rank = (budget - size.fixed) // size.per_rank
    if rank < 1:
        raise InputError(
            f"peer.fraction is {fraction:g}, {budget:,} parameters, and the smallest {what}, 1, takes {size.at(1):,}: "
            f"set it to at least {_three_digits(size.at(1) / total, math.ceil)}, or name fewer modules"
        )
    if size.max_rank is not None and rank > size.max_rank:
        most = size.at(size.max_rank)
        raise InputError(
            f"peer.fraction is {fraction:g}, {budget:,} parameters, and the largest {what}, {size.max_rank}, has "
            f"{most:,}: set it to at most {_three_digits(most / total, math.floor)}, or name more modules"
        )
    return rank


def _three_digits(share: float, whole: Callable[[float], int]) -> str:
    """A share with three significant digits, rounded to the side on which it does."""
    scale = 10.0 ** (2 - math.floor(math.log10(share)))
    return f"{whole(share * scale) / scale:.3g}"


def plan_peer(config: PeerConfig, model: Any, family: ModuleMap) -> PeerPlan:
    """What a peer trains of a model.

    Raises:
        InputError: a pattern matches nothing, or nothing that the method can train; or no rank fits.
    """
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    head = tuple(match_names(config.head, list(shapes), "peer.head", "parameter")) if config.head else ()
    head_modules = _modules_of(head, model)
    targets: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    rank = number = 0
    if config.method == "full":
        found = _parameters(config, model, family)
        parameters = tuple(name for name in found if name not in head)
        number = sum(shapes[name] for name in parameters)
    elif config.method in ADAPTERS:
        matrices = _targets(config, model, family)
        targets = tuple(matrix.module for matrix in matrices)
        _check_apart(targets, head_modules)
        size = adapter_size(config.method, [matrix.shape for matrix in matrices])
        what = "number of tokens" if config.method == "trainable_tokens" else f"rank of {config.method}"
        if config.rank is not None:
            rank = config.rank
            if size.max_rank is not None and rank > size.max_rank:
                raise InputError(f"peer.rank is {rank}, and the largest {what} is {size.max_rank}: lower it")
        else:
            assert config.fraction is not None
            rank = rank_within(size, config.fraction, num_parameters(model, family), what)
        number = size.at(rank)
    check_head_trained(model, (*parameters, *head), "peer.head", "{patterns}")
    return PeerPlan(
        method=config.method,
        targets=targets,
        rank=rank,
        parameters=parameters,
        head=head,
        head_modules=head_modules,
        num_trained=number,
        num_head=sum(shapes[name] for name in head),
    )


def _parameters(config: PeerConfig, model: Any, family: ModuleMap) -> list[str]:
    """Names of all parameters, or of those of the modules that match; tied ones once."""
    everything = [name for name, _ in model.named_parameters()]
    if config.modules is None:
        return everything
    matched = set(match_names(config.modules, _names(everything, family), "peer.modules", "module"))
    matrices = {each.parameter for each in family.matrices if matched.intersection(each.names())}
    return [name for name in everything if name in matrices or matched & {name, name.rpartition(".")[0]}]


def _names(parameters: Sequence[str], family: ModuleMap) -> list[str]:
    """Everything that a pattern may match: modules with parameters, parameters, and other names of tied ones."""
    modules = [name.rpartition(".")[0] for name in parameters]
    return list(dict.fromkeys([*modules, *parameters, *(n for each in family.matrices for n in each.names())]))


def _targets(config: PeerConfig, model: Any, family: ModuleMap) -> list[Matrix]:
    """The matrices that have adapters."""
    if config.method == "trainable_tokens":
        weight = model.get_input_embeddings().weight
        name = next(name for name, parameter in model.named_parameters() if parameter is weight)
        return [family.by_parameter()[name]]
    assert config.modules is not None
    found = match_matrices(config.modules, family, "peer.modules")
    for matrix in found:
        # Of what is stored as [in, out], SHiRA would take a transposed mask.
        if not matrix.is_product or matrix.num_slices is not None or matrix.layout != "out_in":
            raise InputError(
                f"peer.modules matches {matrix.name}, which is no untied linear, and {config.method} adapts linears: "
                "name others"
            )
    return found


def _modules_of(parameters: Sequence[str], model: Any) -> tuple[str, ...]:
    """The modules that have these parameters, all of them and no others.

    Raises:
        InputError: a module has others, too.
    """
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    for module in modules:
        for name, _ in model.get_submodule(module).named_parameters(recurse=False):
            if f"{module}.{name}" not in parameters:
                raise InputError(
                    f"peer.head matches parameters of {module}, but not {module}.{name}, and a head is trained whole: "
                    f"write '{module}.*'"
                )
    return tuple(modules)


def _check_apart(targets: Sequence[str], head_modules: Sequence[str]) -> None:
    for target in targets:
        if target in head_modules:
            raise InputError(
                f"peer.modules matches {target}, which peer.head trains whole: leave it out of one of them"
            )
