"""Whose kernels are compared: of which model and function, on which samples, for which trained parameters?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sparse_zero.errors import InputError

FunctionName = Literal["probe", "sequence_classification", "causal_lm", "masked_lm"]
Head = Literal["fitted", "random"]
StudyKind = Literal["row", "column", "block"]


def _check_some(name: str, values: Sequence[object]) -> None:
    if not values:
        raise InputError(f"{name} is empty: give at least one")
    if len(set(values)) != len(values):
        raise InputError(f"{name} is {list(values)}: give each once")


def _check_least(name: str, values: Sequence[float], least: float) -> None:
    for value in values:
        if value < least:
            raise InputError(f"{name} has {value}: it must be at least {least:g}")


@dataclass(frozen=True, kw_only=True)
class FunctionConfig:
    """The function f(sample) whose gradients make the kernel; one number for two classes, else one per class."""

    # A folder of transformers, or a name of the hub.
    name_or_path: str
    # probe: an encoder's states, averaged over tokens, through a fixed linear head (see heads of the study).
    # sequence_classification: the logits of the model's own head, which its files must hold.
    # causal_lm: the logits of the answers' tokens after the template, answers in the order of the labels.
    # masked_lm: the same at the mask token of the template.
    function: FunctionName = "probe"
    # Of causal_lm and masked_lm: {text}, {second} and, for masked_lm, {mask} are replaced.
    template: str = "{text}"
    # One token each; of causal_lm and masked_lm.
    answers: tuple[str, ...] = ()
    # Tokens of a sample; longer texts are cut before the template's end is added.
    max_length: int = 128

    def __post_init__(self) -> None:
        prompted = self.function in ("causal_lm", "masked_lm")
        if prompted and len(self.answers) < 2:
            raise InputError(
                f"model.answers is {list(self.answers)} for {self.function}: give the word of every label, in order"
            )
        if not prompted and (self.answers or self.template != "{text}"):
            raise InputError(f"model.function is {self.function}, which has no prompt: leave out template and answers")
        if "{text}" not in self.template:
            raise InputError(f"model.template is {self.template!r}: it must have {{text}} in it")
        if self.function == "masked_lm" and self.template.count("{mask}") != 1:
            raise InputError(f"model.template is {self.template!r}: masked_lm needs {{mask}} in it, once")
        _check_least("model.max_length", [self.max_length], 4)


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """The labelled texts; without files, sentences that are made up, so that the study runs without data."""

    # Files (.tsv as GLUE has them, .csv, .jsonl, .json, .parquet). Both or none.
    train: str | None = None
    test: str | None = None
    # Names of the columns.
    text: str = "sentence"
    second_text: str | None = None
    label: str = "label"
    # Test samples: the first ones of an order that is the same for every seed.
    num_test: int = 200

    def __post_init__(self) -> None:
        if (self.train is None) != (self.test is None):
            raise InputError(f"data.train is {self.train} and data.test is {self.test}: set both, or none")
        _check_least("data.num_test", [self.num_test], 2)


@dataclass(frozen=True, kw_only=True)
class SubsetsConfig:
    """Which trained parameters get a kernel, besides all of them."""

    # Matrices of the rows, columns and blocks, and of LoRA; patterns as in a selection.
    modules: tuple[str, ...] = ("*.layer*.[0-9]*",)
    # Budgets: so many rows of each matrix, so many columns of each; blocks and LoRA are measured against the rows.
    per_matrix: tuple[int, ...] = (1, 3, 8)
    kinds: tuple[StudyKind, ...] = ("row", "column", "block")
    # Scores that choose the regions, as in a selection; gradients are those of the training samples' cross entropy.
    # Rows and columns are chosen in each matrix by itself (RoCoFT), blocks over all of them (SMT).
    scores: tuple[str, ...] = ("first", "random", "abs_of_mean")
    # Side of a block.
    block_size: int = 16
    # LoRA at its initialisation: B is zero, so that only the gradients of B count.
    lora_ranks: tuple[int, ...] = (1, 2, 4)
    # Also the biases and norms of the layers, and all the matrices as a whole.
    references: bool = True

    def __post_init__(self) -> None:
        _check_some("subsets.modules", self.modules)
        _check_some("subsets.per_matrix", self.per_matrix)
        _check_least("subsets.per_matrix", self.per_matrix, 1)
        _check_some("subsets.kinds", self.kinds)
        _check_some("subsets.scores", self.scores)
        _check_least("subsets.block_size", [self.block_size], 1)
        if self.lora_ranks:
            _check_some("subsets.lora_ranks", self.lora_ranks)
        _check_least("subsets.lora_ranks", self.lora_ranks, 1)


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How kernels are computed."""

    # Of weights, activations and gradients; sums over matrices are fp64 in any case.
    dtype: Literal["float32", "float64"] = "float32"
    # What activations, their gradients and gradients of weights may take together, beside the model itself. If they
    # take more, the matrices are taken in groups, each with a pass of its own over the samples.
    max_memory_gib: float = 4.0
    # 0: exact. Else the number of random directions onto which the output side of larger matrices is projected for
    # the kernels of whole matrices; those of rows, columns, blocks and LoRA are always exact.
    sketch: int = 0

    def __post_init__(self) -> None:
        if self.max_memory_gib <= 0:
            raise InputError(f"kernel.max_memory_gib is {self.max_memory_gib}: it must be more than 0")
        if self.sketch < 0 or self.sketch % 4:
            raise InputError(
                f"kernel.sketch is {self.sketch}: give a multiple of 4 (its error is told by 4 parts), or 0"
            )


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One study."""

    model: FunctionConfig
    data: SamplesConfig = field(default_factory=SamplesConfig)
    # Of function probe, which has no head of its own. fitted: by ridge regression on the states of as many training
    # samples again, so that the gradient asks what matters for the task, as a prompt does (on the same samples, their
    # labels would be in their kernel); random: without labels.
    heads: tuple[Head, ...] = ("fitted", "random")
    # Training samples of each class.
    shots: tuple[int, ...] = (16,)
    # Of the training samples, random heads, random regions, LoRA's A and sketches.
    seeds: tuple[int, ...] = (0, 1, 2)
    subsets: SubsetsConfig = field(default_factory=SubsetsConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)

    def __post_init__(self) -> None:
        _check_some("heads", self.heads)
        _check_some("shots", self.shots)
        _check_least("shots", self.shots, 2)
        _check_some("seeds", self.seeds)
        _check_least("seeds", self.seeds, 0)
