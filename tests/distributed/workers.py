"""What the spawned ranks do in the tests of ZeRO, checkpoints and adapters."""

from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparse_zero as sz
from sparse_zero.layers.sparsify import selection_of
from sparse_zero.zero.compat import inner_optimizer
from sparse_zero.zero.state import read_masters
from tests.sparse_zero.helpers import TinyModel, mixed_selection, owner_matrix, tiny_loss

GLOBAL_BATCH, LENGTH, VOCABULARY = 8, 9, 32
LEARNING_RATE, DECAY, CLIP = 3e-2, 0.1, 0.5


def make_model() -> TinyModel:
    """The same weights on every rank and in every combination."""
    torch.manual_seed(7)
    return TinyModel(vocabulary=VOCABULARY)


def make_batches(steps: int) -> Tensor:
    """[steps, GLOBAL_BATCH, LENGTH] token ids."""
    return torch.randint(0, VOCABULARY, (steps, GLOBAL_BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def dense_reference(placement: str, steps: int, decay: float = DECAY) -> tuple[list[float], dict[str, Tensor]]:
    """Plain AdamW on the dense model that updates (and decays) the selected entries only; no code of ours."""
    model = make_model()
    selection = mixed_selection(model)
    parameters = dict(model.named_parameters())
    masks = {name: owner_matrix(weight) > 0 for name, weight in selection.weights.items()}
    base = {name: parameters[name].detach()[mask].clone() for name, mask in masks.items()}
    trained = {
        name: nn.Parameter(torch.zeros_like(entries) if placement == "delta" else entries.clone())
        for name, entries in base.items()
    }
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=decay)
    losses = []
    for tokens in make_batches(steps):
        model.zero_grad()
        loss = tiny_loss(model, tokens)
        loss.backward()
        for name, mask in masks.items():
            trained[name].grad = parameters[name].grad[mask]
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name][mask] = trained[name] + (base[name] if placement == "delta" else 0.0)
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in parameters.items()}


def make_engine(
    model: nn.Module, stage: int, micro_batch: int, accumulation: int, decay: float = DECAY
) -> Any:
    """A real engine over the values, AdamW from torch."""
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    engine, *_ = sz.initialize(
        model=model,
        config=config,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=decay),
    )
    return engine


def train(engine: Any, batches: Tensor, micro_batch: int, accumulation: int) -> list[float]:
    """Global losses of the steps over ``batches`` [steps, GLOBAL_BATCH, LENGTH]."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    losses = []
    for tokens in batches:
        total = torch.zeros(())
        for number in range(accumulation):
            start = (number * world_size + rank) * micro_batch
            loss = tiny_loss(engine, tokens[start : start + micro_batch])
            engine.backward(loss)
            engine.step()
            total += loss.detach() / accumulation
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
    return losses


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Dense weights that the engine's values stand for, from the masters."""
    reference = dict(make_model().named_parameters())
    model = engine.module
    selection = selection_of(model)
    masters = read_masters(engine)
    found = {}
    for name, weight in selection.weights.items():
        dense = reference[name].detach().clone()
        for kind in weight.kinds():
            values = masters[f"{name.removesuffix('.weight')}.values_{kind}"]
            positions = weight.flat_indices(kind)
            if model.get_submodule(name.removesuffix(".weight")).placement == "delta":
                values = dense.view(-1)[positions] + values
            dense.view(-1)[positions] = values
        found[name] = dense
    return found


def combinations() -> list[tuple[int, str, int, bool]]:
    """(stage, placement, accumulation, gradient checkpointing), without inplace at stage 3."""
    every = product((0, 1, 2, 3), ("inplace", "delta"), (1, 4), (False, True))
    return [entry for entry in every if not (entry[0] == 3 and entry[1] == "inplace")]


def count_optimizer_elements(engine: Any) -> int:
    """Elements that the optimizers of all ranks own together."""
    inner = inner_optimizer(engine)
    local = sum(parameter.numel() for parameter, state in inner.state.items() if "exp_avg" in state)
    total = torch.tensor(local)
    dist.all_reduce(total)
    return int(total)


def invariants_1_and_3(steps: int) -> list[dict[str, Any]]:
    """Every combination at this world size against the dense reference."""
    world_size = dist.get_world_size()
    report = []
    references = {placement: dense_reference(placement, steps) for placement in ("inplace", "delta")}
    for stage, placement, accumulation, checkpointing in combinations():
        model = make_model()
        model.checkpointing = checkpointing
        selection = mixed_selection(model)
        sz.sparsify(model, selection, placement)
        requiring = sum(p.numel() for p in model.parameters() if p.requires_grad)
        micro_batch = GLOBAL_BATCH // (world_size * accumulation)
        engine = make_engine(model, stage, micro_batch, accumulation)
        losses = train(engine, make_batches(steps), micro_batch, accumulation)
        expected_losses, expected_weights = references[placement]
        weights = full_weights(engine)
        report.append(
            {
                "combination": [world_size, stage, placement, accumulation, checkpointing],
                "loss_difference": max(abs(a - b) / abs(b) for a, b in zip(losses, expected_losses, strict=True)),
                "weight_difference": max(
                    float((weights[name] - expected_weights[name]).abs().max()) for name in weights
                ),
                "effect_of_training": abs(expected_losses[-1] - tiny_loss(make_model(), make_batches(steps)[-1]).item()),
                "num_parameters": selection.num_parameters,
                "requiring_grad": requiring,
                "optimizer_elements": count_optimizer_elements(engine) // (world_size if stage == 0 else 1),
                "num_groups": len(inner_optimizer(engine).param_groups),
                "dense_gradients": sum(p.grad is not None for n, p in model.named_parameters() if "values" not in n),
            }
        )
        engine.destroy()
    return report
