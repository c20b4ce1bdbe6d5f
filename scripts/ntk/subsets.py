"""Which parameters are trained: rows, columns and blocks at some budgets, LoRA, and what they are compared with?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparse_zero as sz
from scripts.ntk.functions import Inputs, SampleFunction
from scripts.ntk.kernels import Subset
from scripts.ntk.study_config import StudyKind, SubsetsConfig
from sparse_zero.errors import InputError

FULL, MATRICES, VECTORS = "full", "matrices", "vectors"
_PLURAL: dict[StudyKind, str] = {"row": "rows", "column": "columns", "block": "blocks"}


@dataclass(frozen=True, kw_only=True)
class Named:
    """What a subset is, for tables and pictures."""

    name: str
    # full, matrices, vectors, rows, columns, blocks or lora.
    kind: str
    # Rows or columns of each matrix (blocks: as many parameters as such rows), LoRA's rank; 0 for the references.
    budget: int = 0
    score: str = ""


def named_subsets(config: SubsetsConfig) -> list[Named]:
    """All subsets of a study, the full one first."""
    found = [Named(name=FULL, kind=FULL)]
    if config.references:
        found += [Named(name=MATRICES, kind=MATRICES), Named(name=VECTORS, kind=VECTORS)]
    for kind in config.kinds:
        for budget in config.per_matrix:
            for score in config.scores:
                plural = _PLURAL[kind]
                found.append(Named(name=f"{plural}-{budget}-{score}", kind=plural, budget=budget, score=score))
    return found + [Named(name=f"lora-{rank}", kind="lora", budget=rank) for rank in config.lora_ranks]


@dataclass(frozen=True, kw_only=True)
class MadeSubset:
    """A subset, and what is told of it."""

    named: Named
    subset: Subset
    num_parameters: int
    notes: tuple[str, ...] = ()


class SubsetMaker:
    """Makes the subsets of one function.

    Args:
        config: of the study.
        function: f; gradients of scores are those of its cross entropy.
        samples: training samples, each a batch of calibration.
        labels: their class numbers.
        seed: of random regions and of LoRA's A.

    Raises:
        InputError: a pattern matches nothing, or matches what is not stored as W[out, in].
    """

    def __init__(
        self,
        config: SubsetsConfig,
        function: SampleFunction,
        samples: Sequence[Inputs],
        labels: Sequence[int],
        seed: int,
    ) -> None:
        self.config, self.function, self.seed = config, function, seed
        self.batches = list(zip(samples, labels, strict=True))
        self.parameters = dict(function.base.named_parameters())
        # By kind and score: budgets differ in the choice alone.
        self._scores: dict[tuple[str, str], sz.RegionScores] = {}
        self.matrices = self._select(self._family("row", 1, "first"))[0]
        stored = {matrix.parameter: matrix for matrix in sz.default_module_map(function.base).matrices}
        for name in self.matrices.weights:
            if name not in stored or stored[name].layout != "out_in":
                raise InputError(
                    f"subsets.modules is {list(config.modules)}, which matches {name}: only matrices that are stored "
                    "as W[out, in] are studied; name others"
                )

    def _family(self, kind: StudyKind, budget: int, score: str) -> sz.SelectionConfig:
        size: dict[str, Any] = {"block_size": self.config.block_size} if kind == "block" else {"per_matrix": budget}
        region = sz.RegionConfig(kind=kind, modules=self.config.modules, score=score, **size)
        amount = None
        if kind == "block":
            # As many parameters as such rows of every matrix.
            rows = budget * sum(weight.shape[1] for weight in self.matrices.weights.values())
            amount = sz.BudgetConfig(parameters=rows)
        return sz.SelectionConfig(regions=(region,), budget=amount, seed=self.seed)

    def _select(self, config: sz.SelectionConfig) -> tuple[sz.Selection, tuple[str, ...]]:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            return self.function.loss(*batch)

        region = config.regions[0]
        key = (region.kind, region.score or "")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", sz.SelectionWarning)
            if key not in self._scores:
                self._scores[key] = sz.score_regions(self.function.base, self.batches, config, loss_fn=loss)
            selection = sz.choose_regions(self.function.base, self._scores[key], config)
        return selection, tuple(str(each.message) for each in caught if each.category is sz.SelectionWarning)

    def make(self, named: Named) -> MadeSubset:
        """One of the subsets of :func:`named_subsets`."""
        if named.kind == FULL:
            return self._whole(named, tuple(self.parameters))
        if named.kind == MATRICES:
            return self._whole(named, tuple(self.matrices.weights))
        if named.kind == VECTORS:
            config = sz.SelectionConfig(
                regions=(sz.RegionConfig(kind="whole", modules=self.config.modules),), seed=self.seed
            )  # fmt: skip
            selection, notes = self._select(config)
        elif named.kind == "lora":
            return self._lora(named)
        else:
            kind = next(kind for kind, plural in _PLURAL.items() if plural == named.kind)
            selection, notes = self._select(self._family(kind, named.budget, named.score))
        return MadeSubset(
            named=named,
            subset=Subset(name=named.name, selection=selection),
            num_parameters=selection.num_parameters,
            notes=notes,
        )

    def _whole(self, named: Named, names: tuple[str, ...]) -> MadeSubset:
        number = sum(self.parameters[name].numel() for name in names)
        return MadeSubset(named=named, subset=Subset(name=named.name, parameters=names), num_parameters=number)

    def _lora(self, named: Named) -> MadeSubset:
        generator = torch.Generator().manual_seed(self.seed)
        down: dict[str, Tensor] = {}
        number = 0
        for name, weight in self.matrices.weights.items():
            # As PEFT initialises A: kaiming_uniform with a = sqrt(5).
            bound = weight.shape[1] ** -0.5
            down[name] = (torch.rand(named.budget, weight.shape[1], generator=generator) * 2 - 1) * bound
            number += named.budget * sum(weight.shape)
        return MadeSubset(named=named, subset=Subset(name=named.name, lora=down), num_parameters=number)
