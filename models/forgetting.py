"""How well does a model predict the tokens of a text? Asked before and after training, it tells what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from models.data import DataConfig, FieldConfig, TokenizedSample, load_samples
from models.evaluation import Progress, evaluating
from models.loading import pad_token_id
from models.records import DataFormat
from models.templates import Template
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TextLoss:
    """The mean loss over some tokens; the same on every rank."""

    # Nats per token: the natural logarithm of the perplexity.
    loss: float
    num_tokens: int


def text_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    file: str,
    *,
    max_length: int,
    max_tokens: int,
    split: str = DataConfig.forgetting_split,
    data_format: DataFormat = "auto",
    fields: FieldConfig | None = None,
    template: Template = "alpaca",
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> TextLoss:
    """Mean loss of a model on a file. Collective when torch.distributed is initialised.

    Args:
        model: as for :func:`mean_loss`.
        tokenizer: the model's.
        file: plain text, or records as for ``data.forgetting``.
        max_length: tokens of a sample.
        max_tokens: tokens that are predicted at most, over all ranks, from the start of the file.
        split: names the file of a folder.
        data_format: how the file is parsed.
        fields: names of the fields of a record.
        template: of records without ``fields.text``.
        batch_size: samples of one forward pass.
        rank: this process's, in [0, world_size).
        world_size: processes that share the samples.

    Raises:
        InputError: the file cannot be used, or its samples exceed the model's context.
    """
    config = DataConfig(
        train=file,
        forgetting=file,
        forgetting_split=split,
        forgetting_tokens=max_tokens,
        format=data_format,
        template=template,
        max_length=max_length,
        fields=fields or FieldConfig(),
    )
    samples = load_samples(config, tokenizer, "forgetting")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and max(samples.lengths) > context:
        raise InputError(
            f"max_length lets samples have up to {max(samples.lengths)} tokens, and the model has room for {context}: "
            "lower it"
        )
    return mean_loss(
        model, samples.texts, pad_token_id(tokenizer), batch_size=batch_size, rank=rank, world_size=world_size
    )


def mean_loss(
    model: Any,
    samples: Sequence[TokenizedSample],
    pad_id: int,
    *,
    batching: Literal["pad", "pack"] = "pad",
    batch_size: int = 1,
    chunk: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> TextLoss:
    """Mean loss of a model over the labels of samples. Collective when torch.distributed is initialised.

    Every rank makes the same number of forward passes, as weights sharded by ZeRO-3 need, and the samples of a pass do
    not depend on the world size.

    Args:
        model: a causal LM of transformers, its linears replaced or not; at stage 3 within
            :func:`sparse_zero.zero.inference.sharded_forward`. It is left in the mode in which it came.
        samples: the same ones on every rank.
        pad_id: fills a batch up.
        batching: form of a batch, as ``data.batching``.
        batch_size: samples of one forward pass.
        chunk: as ``training.loss_chunk``.
        rank: this process's, in [0, world_size).
        world_size: processes that share the samples.
        progress: called after every batch with those done and all of this rank's.
    """
    import torch

    from models.collate import collate, micro_batch, response_tokens
    from models.gather import gather_json
    from models.loss import response_nll
    from models.sampler import BatchSampler
    from models.transfer import to_device

    sampler = BatchSampler(len(samples), batch_size * world_size, batch_size, world_size, rank, 0, False)
    total, num_tokens = 0.0, 0
    # Not inference mode: weights gathered in it could not be saved for a backward later.
    with evaluating(model, None), torch.no_grad():
        for step in range(sampler.steps_per_epoch):
            (indices,) = sampler.step(step).micro_batches
            mine = micro_batch(samples, indices)
            batch = collate(mine, batching=batching, pad_token_id=pad_id)
            total += float(response_nll(model, to_device(batch, model.device), chunk=chunk))
            num_tokens += response_tokens(mine)
            if progress is not None:
                progress(step + 1, sampler.steps_per_epoch)
    sums = [sum(each) for each in zip(*gather_json([total, num_tokens]), strict=True)]
    return TextLoss(loss=sums[0] / sums[1], num_tokens=int(sums[1]))
