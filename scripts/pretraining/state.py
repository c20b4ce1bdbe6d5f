"""What is written while a small Llama is pre-trained, so that a stop or a kill costs a minute at most?"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_zero.errors import InputError
from sparse_zero.files import read_safetensors, to_json, write_safetensors

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

STATE_NAME = "pretraining_state.safetensors"
_FORMAT = "sparse_zero.pretraining"


@dataclass(kw_only=True)
class Progress:
    """How far it has come."""

    step: int = 0
    # None: not known yet, since the time of a step is not.
    num_steps: int | None = None
    # In steps, of all starts.
    seconds: float = 0.0
    # (step, mean loss since the point before) and (step, validation loss).
    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)


def save_state(
    folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, progress: Progress, what: Any
) -> None:
    """Write weights, moments and progress in one step; ``what`` tells which pre-training it is."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                tensors[f"{key}/{name}"] = optimizer.state[parameter][key]
    metadata = {"format": _FORMAT, "progress": to_json(asdict(progress)), "what": to_json(what)}
    write_safetensors(folder / STATE_NAME, tensors, metadata)


def load_state(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, what: Any) -> Progress:
    """Put back what :func:`save_state` has written.

    Raises:
        InputError: there is none, it is damaged, or it is of another pre-training.
    """
    import torch

    path = folder / STATE_NAME
    tensors, metadata = read_safetensors(path, _FORMAT)
    try:
        found, progress = json.loads(metadata["what"]), Progress(**json.loads(metadata["progress"]))
        progress.train, progress.validation = (
            [(int(step), float(loss)) for step, loss in points] for points in (progress.train, progress.validation)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it, and begin anew") from error
    for name, value in json.loads(to_json(what)).items():
        if found.get(name) != value:
            raise InputError(
                f"--out has a pre-training with {name} {found.get(name)!r}, and now it is {value!r}: give the same, or "
                "name another folder"
            )
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[f"weight/{name}"])
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(progress.step)),
                    **{key: tensors[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq")},
                }
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path} does not fit the model ({error}): delete it, and begin anew") from error
    return progress
