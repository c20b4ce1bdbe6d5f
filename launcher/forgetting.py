"""What does a run forget? The mean loss on other text, of the base and of the tuned model."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from launcher.evaluating import at_work
from launcher.preparing import Prepared
from launcher.world import World
from models.data import TokenizedSample
from models.forgetting import TextLoss, mean_loss
from models.gather import gather_json
from models.loading import pad_token_id
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_json


class Forgetting(TypedDict):
    """What stands in the run's summary."""

    # Nats per token; None: not measured yet.
    base: float | None
    tuned: float | None
    # Predicted by each of them.
    num_tokens: int


def loss_on(prepared: Prepared, world: World, model: Any, samples: Sequence[TokenizedSample], title: str) -> TextLoss:
    """Mean loss of a model, whole or in shards, over samples of text; a progress bar on rank 0. Collective."""
    config = prepared.config
    with at_work(config, world, model, title) as tell:
        return mean_loss(
            model,
            samples,
            pad_token_id(prepared.tokenizer),
            batching=config.data.batching,
            batch_size=config.training.micro_batch_size,
            chunk=config.training.loss_chunk,
            rank=world.rank,
            world_size=world.world_size,
            progress=tell,
        )


def measure_forgetting(
    prepared: Prepared, world: World, model: Any, name: str, earlier: Forgetting | None = None
) -> Forgetting:
    """Measure a model on ``data.forgetting``, and write what is known by now into the run folder. Collective.

    Args:
        prepared: with the samples.
        world: this process's place.
        model: of transformers, whole or in shards.
        name: base or tuned. The base of a run that goes on is not measured again: it may be another one by now.
        earlier: what was measured before.

    Raises:
        InputError: the file of an earlier start is damaged.
    """
    assert prepared.forgetting is not None
    out = prepared.folder.forgetting
    if name == "base" and all(gather_json(prepared.resumes and out.is_file())):
        return _read(out)
    title = f"measuring the {name} model on other text"
    found = loss_on(prepared, world, model, prepared.forgetting.texts, title)
    if world.is_main:
        told = f"{name} model: loss {found.loss:.4f} a token of data.forgetting ({found.num_tokens:,} tokens)"
        print(told, file=sys.stderr, flush=True)
    base, tuned = (found.loss, None) if name == "base" else (earlier and earlier["base"], found.loss)
    measured = Forgetting(base=base, tuned=tuned, num_tokens=found.num_tokens)
    if world.is_main:
        atomic_write_json(out, measured)
    return measured


def _read(path: Path) -> Forgetting:
    content = read_json(path, strict=True)
    try:
        return Forgetting(base=float(content["base"]), tuned=None, num_tokens=int(content["num_tokens"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no measurement ({error!r}): delete it, and it is made again") from error
