"""What is the loss of a micro-batch of classified texts, what must a classifier be told, and what does it answer?

Shapes: B samples of a micro-batch, C classes (1: a number is predicted).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.classified_data import Labels
from models.data import IGNORED
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def set_up_classifier(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labels: Labels) -> None:
    """Tell a model, by its config, the words of its classes and which token is padding.

    Decoders read the class from the last token that is no padding, encoders like RoBERTa count positions without it.

    Raises:
        InputError: an encoder was trained with another padding token than the tokenizer's.
    """
    pad = tokenizer.pad_token_id
    own = getattr(model.config, "pad_token_id", None)
    if own != pad and position_offset(model):
        raise InputError(
            f"model.tokenizer pads with token {pad}, and the model counts positions by its padding token {own}: use "
            "the model's own tokenizer"
        )
    model.config.pad_token_id = pad
    if labels.names is not None:
        model.config.id2label = dict(enumerate(labels.names))
        model.config.label2id = {name: number for number, name in enumerate(labels.names)}


def position_offset(model: PreTrainedModel) -> int:
    """Positions of its table that a model gives to no token: RoBERTa's begin behind that of the padding token."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def check_context(model: Any, lengths: Sequence[int]) -> None:
    """Raise if samples of these lengths, at least one, are longer than the model has positions for.

    Raises:
        InputError: they are.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and max(lengths) > context - position_offset(model):
        raise InputError(
            f"data.max_length lets samples have up to {max(lengths)} tokens, and the model has room for "
            f"{context - position_offset(model)}: lower data.max_length"
        )


def takes(model: Any, name: str) -> bool:
    """Whether a model, also in an engine, can be given the input ``name``."""
    inner = getattr(model, "module", model)
    if name == "token_type_ids" and getattr(inner.config, "type_vocab_size", 0) < 2:
        return False
    return name in inspect.signature(type(inner).forward).parameters


def class_logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """[B, C] fp32: what a classifier gives for a batch of :func:`models.collate.collate_classified`."""
    inputs: dict[str, Any] = {
        name: tensor
        for name, tensor in batch.items()
        if name != "targets" and (name != "token_type_ids" or takes(model, name))
    }
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    logits: Tensor = model(**inputs).logits
    return logits.float()


def classified_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed loss of a batch in fp32: negative log-likelihood of the classes, or squared error of numbers.

    Args:
        model: a classifier of transformers, or an engine over one.
        batch: of :func:`models.collate.collate_classified`; samples whose target is NaN count nothing.

    Returns:
        Scalar; zero (but connected to the graph) when no sample has a target.
    """
    logits_BC, targets_B = class_logits(model, batch), batch["targets"]
    is_ignored_B = targets_B.isnan()
    if logits_BC.shape[1] == 1:
        wanted_B = targets_B.nan_to_num(0.0).float()
        errors_B = (logits_BC.squeeze(1) - wanted_B).square()
        return errors_B.masked_fill(is_ignored_B, 0.0).sum()
    classes_B = targets_B.nan_to_num(float(IGNORED)).long()
    return torch.nn.functional.cross_entropy(logits_BC, classes_B, ignore_index=IGNORED, reduction="sum")


def classification_metrics(targets: Sequence[float], predictions: Sequence[float], labels: Labels) -> dict[str, Any]:
    """What GLUE measures (arXiv 1804.07461, section 3); a figure that is not defined is None.

    Args:
        targets: numbers of the right classes, or the right numbers.
        predictions: likewise; -1 for none of the classes.
        labels: what they mean.

    Returns:
        Of classes ``accuracy``, ``f1`` (of class 1 where there are two, else the mean over classes) and ``matthews``;
        of numbers ``pearson``, ``spearman`` and ``mean_squared_error``.
    """
    if labels.is_regression:
        if not all(map(math.isfinite, predictions)):
            return dict.fromkeys(("pearson", "spearman", "mean_squared_error"))
        return {
            "pearson": _pearson(targets, predictions),
            "spearman": _pearson(_ranks(targets), _ranks(predictions)),
            "mean_squared_error": math.fsum((a - b) ** 2 for a, b in zip(targets, predictions, strict=True))
            / len(targets),
        }
    pairs = [(int(target), int(prediction)) for target, prediction in zip(targets, predictions, strict=True)]
    counted = [1] if labels.num_labels == 2 else list(range(labels.num_labels))
    return {
        "accuracy": sum(target == prediction for target, prediction in pairs) / len(pairs),
        "f1": math.fsum(_f1(pairs, each) for each in counted) / len(counted),
        "matthews": _matthews(pairs, labels.num_labels),
    }


def _f1(pairs: Sequence[tuple[int, int]], label: int) -> float:
    both = sum(target == prediction == label for target, prediction in pairs)
    either = sum((target == label) + (prediction == label) for target, prediction in pairs)
    return 2 * both / either if either else 0.0


def _matthews(pairs: Sequence[tuple[int, int]], num_labels: int) -> float | None:
    """Matthews' correlation of any number of classes (Gorodkin 2004); None where all are of one class."""
    right = sum(target == prediction for target, prediction in pairs)
    had = [sum(target == each for target, _ in pairs) for each in range(num_labels)]
    given = [sum(prediction == each for _, prediction in pairs) for each in range(num_labels)]
    number = len(pairs)
    # A class of their own, which no target has.
    none = number - sum(given)
    above = right * number - sum(a * b for a, b in zip(had, given, strict=True))
    below = (number**2 - sum(a * a for a in (*given, none))) * (number**2 - sum(a * a for a in had))
    return above / math.sqrt(below) if below else None


def _pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    if min(first) == max(first) or min(second) == max(second):
        return None  # Rounded means would make noise of it.
    means = [math.fsum(each) / len(each) for each in (first, second)]
    a, b = ([value - mean for value in each] for each, mean in zip((first, second), means, strict=True))
    below = math.sqrt(math.fsum(x * x for x in a) * math.fsum(x * x for x in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / below if below else None


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1 on; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            ranks[index] = (start + 1 + end) / 2
        start = end
    return ranks
