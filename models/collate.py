"""How do tokenized samples become the tensors of one forward pass?

Shapes: B samples of a micro-batch, L tokens of the longest of them, S tokens of all of them together.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from models.data import IGNORED, ClassifiedSample, Sample, TokenizedSample

# Tokens kept of the sample that stands in for an empty micro-batch: enough to have a next-token prediction.
_STAND_IN_LENGTH = 2


def micro_batch(samples: Sequence[Sample], indices: Sequence[int]) -> list[Sample]:
    """The samples of one micro-batch, never none.

    An empty micro-batch (the world size does not divide the global batch) becomes the start of the first
    sample with every label ignored: the rank takes part in the step, and adds nothing to the loss.
    """
    if indices:
        return [samples[index] for index in indices]
    first = samples[0]
    ids = first.input_ids[:_STAND_IN_LENGTH]
    if isinstance(first, ClassifiedSample):
        return [ClassifiedSample(ids, None, first.token_type_ids[:_STAND_IN_LENGTH])]
    return [TokenizedSample(ids, [IGNORED] * len(ids))]


def collate(
    samples: Sequence[Sample], *, batching: Literal["pad", "pack"], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """Make the tensors of one forward pass by :func:`collate_classified`, :func:`collate_pad` or :func:`collate_pack`.

    All samples are of one sort; classified ones are always padded.
    """
    classified = [sample for sample in samples if isinstance(sample, ClassifiedSample)]
    if classified:
        return collate_classified(classified, pad_token_id)
    tokenized = [sample for sample in samples if isinstance(sample, TokenizedSample)]
    return collate_pack(tokenized) if batching == "pack" else collate_pad(tokenized, pad_token_id)


def collate_pad(samples: Sequence[TokenizedSample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Fill the samples up on the right to the longest of them.

    Args:
        samples: at least one.
        pad_token_id: any token id; the attention mask and the labels hide it.

    Returns:
        ``input_ids``, ``attention_mask`` (1 on tokens, 0 on padding) and ``labels`` (-100 on padding), each
        [B, L] int64.
    """
    _check_not_empty(samples)
    shape_BL = (len(samples), max(len(sample.input_ids) for sample in samples))
    input_ids_BL = torch.full(shape_BL, pad_token_id, dtype=torch.int64)
    mask_BL = torch.zeros(shape_BL, dtype=torch.int64)
    labels_BL = torch.full(shape_BL, IGNORED, dtype=torch.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids_BL[row, :length] = torch.tensor(sample.input_ids)
        mask_BL[row, :length] = 1
        labels_BL[row, :length] = torch.tensor(sample.labels)
    return {"input_ids": input_ids_BL, "attention_mask": mask_BL, "labels": labels_BL}


def collate_classified(samples: Sequence[ClassifiedSample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Fill the samples up on the right to the longest of them.

    Args:
        samples: at least one.
        pad_token_id: the one that the model's own config names.

    Returns:
        ``input_ids``, ``attention_mask`` and, if the tokenizer gave some, ``token_type_ids`` (0 on padding), each
        [B, L] int64; ``targets`` [B] fp64, NaN where the loss ignores the sample.
    """
    _check_not_empty(samples)
    length = max(len(sample.input_ids) for sample in samples)

    def filled(rows: Sequence[Sequence[int]], number: int) -> torch.Tensor:
        return torch.tensor([[*row, *[number] * (length - len(row))] for row in rows], dtype=torch.int64)

    tensors = {
        "input_ids": filled([sample.input_ids for sample in samples], pad_token_id),
        "attention_mask": filled([[1] * len(sample.input_ids) for sample in samples], 0),
    }
    if any(sample.token_type_ids for sample in samples):
        tensors["token_type_ids"] = filled([sample.token_type_ids for sample in samples], 0)
    targets = [math.nan if sample.target is None else sample.target for sample in samples]
    return {**tensors, "targets": torch.tensor(targets, dtype=torch.float64)}


def collate_pack(samples: Sequence[TokenizedSample]) -> dict[str, torch.Tensor]:
    """Put the samples one behind the other into a single row without padding.

    Positions restart at 0 with every sample, from which transformers derives that no token may attend to
    another sample. It does so only without an attention mask **and without a cache**: call the model with
    ``use_cache=False``, or every sample silently reads those before it. And it does so only for some families:
    see :func:`models.families.can_pack`.

    Args:
        samples: at least one.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, each [1, S] int64. The first label of every sample is
        -100: in shifted labels, it is what the last token of the sample before would have to predict.
    """
    _check_not_empty(samples)
    ids = [token for sample in samples for token in sample.input_ids]
    positions = [position for sample in samples for position in range(len(sample.input_ids))]
    labels = [label for sample in samples for label in [IGNORED, *sample.labels[1:]]]
    tensors = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor([row], dtype=torch.int64) for name, row in tensors.items()}


def response_tokens(samples: Sequence[Sample]) -> int:
    """Number of tokens (of classified samples: of samples) that the loss of these sums over, padded and packed alike.

    A sample's first token is never one of them: nothing before it predicts it.
    """
    return sum(sample.num_targets for sample in samples)


def _check_not_empty(samples: Sequence[Sample]) -> None:
    if not samples or not all(sample.input_ids for sample in samples):
        raise ValueError("a batch needs at least one sample, and every sample a token")
