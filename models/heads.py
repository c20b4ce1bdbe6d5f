"""Where does a classifier's head come from that the base's files lack: which weights are new, and with which numbers?

A base such as BERT has no head for the classes of somebody's data. Its weights are made here from a seed, each one from
the seed and its own name: equal on all ranks and at every stage, whoever makes it and in whatever order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.source import is_classifier
from models.weight_files import read_json_object
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from models.loading import ModelConfig
    from sparse_zero.selection.selection import Selection

# Attribute of a loaded model: names of the weights that its files lacked.
_NEW = "_sparse_zero_new_weights"
# Of models whose config does not say it.
_INITIALIZER_RANGE = 0.02


def head_is_new(config: ModelConfig, folder: Path) -> bool:
    """Whether the model is to classify, and its files are of one that does not."""
    return config.classifies and not is_classifier(read_json_object(folder / "config.json"))


def head_text(config: ModelConfig, folder: Path, seed: int) -> str | None:
    """What a new head is made from, in words for the identity of the base; None where the files have one or need none.

    Values of placement delta, and scores, mean nothing over another head.
    """
    return f"head {config.task} {config.num_labels} seed {seed}" if head_is_new(config, folder) else None


def label_settings(config: ModelConfig) -> dict[str, Any]:
    """What a classifier's config must say, by the names of transformers."""
    problem = "regression" if config.num_labels == 1 else "single_label_classification"
    return {"num_labels": config.num_labels, "problem_type": problem}


def not_of_head(
    model: PreTrainedModel, missing: Iterable[Any], unexpected: Iterable[Any]
) -> tuple[list[str], list[str]]:
    """Those of the weights that files lack, and have beyond the model's, which are no head: a part of the encoder.

    A pooler lies in the encoder, and is one of the head: what trains on tokens has none.
    """
    from sparse_zero.module_map import layer_index, role_from_name

    inside = f"{model.base_model_prefix}."
    lacking = [name for name in map(str, missing) if name.startswith(inside) and "pooler" not in name.split(".")]
    beyond = [
        name
        for name in map(str, unexpected)
        if layer_index(name) is not None or role_from_name(name.rpartition(".")[0]) == "embedding"
    ]
    return lacking, beyond


def new_weight(name: str, shape: Sequence[int], seed: int, deviation: float) -> torch.Tensor:
    """The numbers that a new weight starts with: fp32, on the host.

    Matrices are normal with ``deviation``, as the families of transformers have them; biases zero, norms one.
    """
    import torch

    if len(shape) == 1:
        return torch.zeros(tuple(shape)) if name.endswith("bias") else torch.ones(tuple(shape))
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.empty(tuple(shape)).normal_(0.0, deviation, generator=generator)


def deviation_of(model: PreTrainedModel) -> float:
    """Standard deviation of a model's new matrices."""
    found = getattr(model.config, "initializer_range", None)
    return float(found) if isinstance(found, int | float) else _INITIALIZER_RANGE


def make_head(model: PreTrainedModel, names: Iterable[Any], seed: int) -> None:
    """Fill the weights of these names anew, and remember which they are."""
    import torch

    wanted = sorted(str(name) for name in names)
    with torch.no_grad():
        for name in wanted:
            parameter = model.get_parameter(name)
            parameter.copy_(new_weight(name, parameter.shape, seed, deviation_of(model)))
    remember_head(model, wanted)


def remember_head(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Note that the files of ``model`` lack these weights."""
    setattr(model, _NEW, tuple(sorted(names)))


def fresh_head(model: Any) -> tuple[str, ...]:
    """Names of the weights that a model's files lacked, sorted; none of a model that was complete."""
    found: tuple[str, ...] = getattr(model, _NEW, ())
    return found


def check_head_trained(
    model: PreTrainedModel,
    trained: Iterable[str],
    field: str = "selection.regions",
    remedy: str = "{{kind: whole, modules: [{patterns}]}}",
) -> None:
    """Raise unless every new weight is trained entirely: what stays as it was made would be noise.

    Args:
        model: loaded, not sparse yet.
        trained: names of the weights and vectors that are trained entirely.
        field: of the config, that says so.
        remedy: what to add to it, with patterns that match.

    Raises:
        InputError: names the regions to add.
    """
    left = sorted(set(fresh_head(model)) - set(trained))
    if not left:
        return
    prefix = str(model.base_model_prefix)
    patterns = []
    for name in left:
        parts = name.split(".")
        patterns.append(".".join(parts[: 2 if parts[0] == prefix else 1]) + ".*")
    listed = ", ".join(f'"{each}"' for each in dict.fromkeys(patterns))
    shown = ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")
    raise InputError(
        f"{field} leaves {shown} untrained, which the base lacks and which start at random: add "
        + remedy.format(patterns=listed)
    )


def trained_entirely(selection: Selection) -> list[str]:
    """Names of the weights of which a selection trains every entry."""
    return [
        name for name, chosen in selection.weights.items() if chosen.num_parameters == chosen.shape[0] * chosen.shape[1]
    ]
