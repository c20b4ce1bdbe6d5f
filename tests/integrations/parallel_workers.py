"""What the spawned ranks do in the tests of ways to split one model over ranks besides ZeRO."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparse_zero as sz
from sparse_zero.integrations.trainer import SparseZeroCallback
from sparse_zero.layers.sparsify import placement_of
from sparse_zero.zero.config import PLACEMENTS, Placement
from sparse_zero.zero.state import read_masters
from tests.integrations.workers import (
    arguments,
    deepspeed_settings,
    error_of,
    losses_of,
    make_model,
    weights_are_values,
)

LENGTH, SAMPLES, STEPS, RATE = 16, 1, 4, 0.5


def token_batches() -> Tensor:
    """[STEPS, SAMPLES, LENGTH] token ids."""
    return torch.randint(4, 384, (STEPS, SAMPLES, LENGTH), generator=torch.Generator().manual_seed(11))


def settings(stage: int, **sections: Any) -> dict[str, Any]:
    """A config for one micro-batch a step."""
    return {
        "train_micro_batch_size_per_gpu": SAMPLES,
        # DeepSpeed clips at 1 otherwise.
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        **sections,
    }


def gradient_steps(groups: Any) -> torch.optim.Optimizer:
    """Plain steps along the gradient, which show any wrong factor."""
    return torch.optim.SGD(groups, lr=RATE)


@cache
def alone(placement: Placement) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and values of the same training in one process, without DeepSpeed, and with torch's attention."""
    model = make_model(placement)
    optimizer = gradient_steps(sz.parameter_groups(model))
    losses = []
    for tokens in token_batches():
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        sz.write_back(model)
        losses.append(loss.item())
    return losses, {name: values.detach().clone() for name, values in sz.trainable_parameters(model).items()}


def _compare(engine: Any, losses: list[float], expected: tuple[list[float], dict[str, Tensor]]) -> dict[str, float]:
    """Largest differences from training in one process, and how far that went."""
    masters, (wanted_losses, wanted) = read_masters(engine), expected
    start = dict(sz.trainable_parameters(make_model(placement_of(engine.module))))
    return {
        "loss_difference": max(abs(a - b) / b for a, b in zip(losses, wanted_losses, strict=True)),
        "change": max(float((wanted[name] - start[name]).abs().max()) for name in wanted),
        "difference": max(float((masters[name] - wanted[name]).abs().max()) for name in wanted),
    }


def _ulysses_loop(stage: int, placement: Placement, mpu: Any) -> dict[str, Any]:
    """A loop of one's own: each rank has a part of every sequence, and the loss of that part."""
    model = make_model(placement)
    engine, *_ = sz.initialize(model=model, config=settings(stage), optimizer=gradient_steps, mpu=mpu)
    rank, world_size = dist.get_rank(), engine.sequence_parallel_size
    mine = slice(rank * LENGTH // world_size, (rank + 1) * LENGTH // world_size)
    losses = []
    for tokens in token_batches():
        targets = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        positions = torch.arange(LENGTH).expand_as(tokens)
        logits = engine(input_ids=tokens[:, mine], position_ids=positions[:, mine], use_cache=False).logits
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, mine].flatten(), reduction="sum")
        share = nll / (targets != -100).sum()
        # The lines of docs/integrations.md: stages 0 to 2 add the gradients of a sequence's ranks, stage 3 averages.
        engine.backward(share * engine.sequence_parallel_size if stage == 3 else share)
        engine.step()
        whole = share.detach().clone()
        dist.all_reduce(whole)
        losses.append(whole.item())
    report = _compare(engine, losses, alone(placement))
    report["written_back"] = placement == "delta" or weights_are_values(model)
    engine.destroy()
    return report


def _ulysses_trainer(folder: Path, stage: int) -> dict[str, Any]:
    """The Trainer's own sequence parallelism."""
    from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig
    from transformers import Trainer

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        tokens = torch.stack(rows)
        return {"input_ids": tokens, "labels": tokens.clone(), "position_ids": torch.arange(LENGTH).expand_as(tokens)}

    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    parallelism = ParallelismConfig(sp_size=dist.get_world_size(), sp_backend="deepspeed", sp_handler=handler)
    trainer = Trainer(
        make_model("delta"),
        arguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=SAMPLES,
            gradient_accumulation_steps=1,
            learning_rate=RATE,
            weight_decay=0.0,
            max_grad_norm=0.0,
            optim="sgd",
            save_strategy="no",
            parallelism_config=parallelism,
            deepspeed=deepspeed_settings(stage),
        ),
        data_collator=collate,
        # All ranks work on one sample after another, of whichever rank it is.
        train_dataset=list(token_batches().flatten(0, 1)),
        callbacks=[SparseZeroCallback()],
    )
    trainer.train()
    return _compare(trainer.model_wrapped, losses_of(trainer), alone("delta"))


def splits(folder: Path) -> dict[str, Any]:
    """Ulysses and AutoTP. Last of all in a process: DeepSpeed goes on with their groups."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from deepspeed.runtime.tensor_parallel import init_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def tensor_parallel(**sections: Any) -> str:
        model = make_model()
        return error_of(lambda: sz.initialize(model=model, config=settings(1, **sections), optimizer=gradient_steps))

    report: dict[str, Any] = {"autotp": tensor_parallel(tensor_parallel={"autotp_size": 2})}
    report["autoep"] = tensor_parallel(expert_parallel={"enabled": True})
    deepspeed.tp_model_init(make_model(), 2, torch.float32)
    report["tp_model_init"] = tensor_parallel()
    init_utils._TP_MODEL_INIT_ARGS = None

    for placement in PLACEMENTS:
        alone(placement)
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=make_model(),
        core_attn_implementation="sdpa",
        sequence_parallel_size=dist.get_world_size(),
        micro_batch_size=SAMPLES,
        seq_length_is_variable=True,
    )
    for stage, placement in ((1, "inplace"), (2, "inplace"), (3, "delta")):
        report[f"ulysses {stage}"] = _ulysses_loop(stage, placement, mpu)
    unclear = {"zero_optimization": {"stage": 3, "reduce_scatter": False}}
    report["reduce_scatter"] = error_of(
        lambda: sz.initialize(model=make_model(), config=settings(3) | unclear, optimizer=gradient_steps, mpu=mpu)
    )
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    parallel_state_sp._release_sequence_parallel_groups()
    report["trainer 3"] = _ulysses_trainer(folder / "ulysses", 3)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    parallel_state_sp._release_sequence_parallel_groups()
    report["trainer 2"] = error_of(lambda: _ulysses_trainer(folder / "ulysses", 2))
    return report
