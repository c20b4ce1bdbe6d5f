"""Which class does a classifier give held-out texts, or which number, and how often is it right?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from models.classification import check_context, class_logits, classification_metrics
from models.classified_data import Labels, load_classified, targets_of, texts_of
from models.collate import collate
from models.data import DataConfig
from models.evaluation import (
    EvaluationResult,
    Prediction,
    Progress,
    batches_of_rank,
    evaluating,
    with_progress,
    without_gradients,
)
from models.gather import gather_json
from models.loading import pad_token_id
from models.transfer import to_device
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A predicted number is right when it is nearer to its label than this: when both are rounded to the same grade of
# a scale of whole numbers, about.
_NEAR = 0.5
# What a model that has lost itself in NaN gives instead of a class; it is right for no text.
_NO_CLASS = -1.0


def evaluate_classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, str]],
    config: DataConfig,
    labels: Labels,
    *,
    rank: int = 0,
    world_size: int = 1,
    lockstep: bool = False,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Classify the texts of the records. Collective when torch.distributed is initialised.

    Args:
        model: a classifier, set up by :func:`models.classification.set_up_classifier`.
        tokenizer: the model's.
        records: test records with text and label; all ranks pass the same ones.
        config: names of the fields, maximum length, and how many at once.
        labels: what the labels mean.
        rank: this process's, in [0, world_size).
        world_size: processes that share the records; each holds the whole model, or ``lockstep`` is set.
        lockstep: every rank makes the same number of forward passes, as weights sharded by ZeRO-3 need.
        progress: called after every batch.

    Raises:
        InputError: there are no records, a label stands for nothing, or a text is empty or exceeds the model's context.
    """
    if not records:
        raise InputError("data.test has no problems: name a file with some")
    records = records[: config.evaluation.limit]
    targets = targets_of(config, records, "test", labels)
    found_samples = load_classified(config, tokenizer, "test", labels, records)
    samples = found_samples.samples
    check_context(model, found_samples.lengths)
    batches = batches_of_rank(found_samples.lengths, config.evaluation.batch_size, rank, world_size, lockstep)
    found: list[tuple[int, list[float]]] = []
    with evaluating(model, None), without_gradients(lockstep):
        for batch, is_real in with_progress(batches, progress):
            rows = [samples[index] for index in batch]
            collated = collate(rows, batching="pad", pad_token_id=pad_token_id(tokenizer))
            logits_BC = class_logits(model, to_device(collated, model.device))
            answers = logits_BC if labels.is_regression else logits_BC.softmax(1)
            found += list(zip(batch, answers.tolist(), strict=True)) if is_real else []
    everyone = sorted((index, row) for part in gather_json(found) for index, row in part)
    given = [row[0] if labels.is_regression else _likeliest(row) for _, row in everyone]
    predictions = tuple(
        _prediction(index, row, number, targets[index], config, records[index], labels)
        for (index, row), number in zip(everyone, given, strict=True)
    )
    return EvaluationResult(
        kind="classify", predictions=predictions, metrics=classification_metrics(targets, given, labels)
    )


def _likeliest(row: Sequence[float]) -> float:
    """The class of most probability."""
    return _NO_CLASS if any(map(math.isnan, row)) else float(row.index(max(row)))


def _prediction(
    index: int,
    row: Sequence[float],
    number: float,
    target: float,
    config: DataConfig,
    record: Mapping[str, str],
    labels: Labels,
) -> Prediction:
    first, second = texts_of(config, record)
    if labels.is_regression:
        answer, prediction, text = f"{target:g}", f"{number:.4f}", ""
        correct = abs(number - target) < _NEAR
    else:
        is_class = number != _NO_CLASS
        answer, prediction = labels.name(int(target)), labels.name(int(number)) if is_class else ""
        text, correct = f"{row[int(number)]:.4f}" if is_class else "nan", number == target
    return Prediction(
        index=index,
        instruction=first if second is None else f"{first}\n{second}",
        answer=answer,
        prediction=prediction,
        text=text,
        correct=correct,
    )
