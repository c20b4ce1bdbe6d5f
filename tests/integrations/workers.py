"""What the spawned ranks do in the tests of other trainers: one process start for many runs."""

import gc
import importlib.util
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

import sparse_zero as sz
from launcher.config import RunConfig
from launcher.metrics import MetricsLog, read_metrics
from launcher.preparing import new_engine
from launcher.run_folder import RunFolder
from launcher.training_config import OutputConfig, TrainingConfig
from launcher.training_loop import LoopState, train
from launcher.world import World
from models.collate import collate_pad, response_tokens
from models.data import IGNORED, DataConfig, TokenizedSample
from models.loading import ModelConfig
from models.loss import response_nll
from models.sampler import BatchSampler
from sparse_zero.checkpoint.random_states import RandomStatesWarning
from sparse_zero.collectives import rank_and_world_size
from sparse_zero.integrations.accelerator import attach_accelerator
from sparse_zero.integrations.trainer import SparseZeroCallback
from sparse_zero.layers.carriers import carriers
from sparse_zero.selection.config import SelectionConfig
from sparse_zero.zero.compat import has_shards
from sparse_zero.zero.config import Placement, ZeroConfig
from tests.models.tiny import tiny_llama
from tests.sparse_zero.helpers import mixed_selection

STEPS, ACCUMULATION, MICRO_BATCH, GLOBAL_BATCH, NUM_SAMPLES = 6, 2, 2, 8, 8
LEARNING_RATE, DECAY, CLIP, PAD = 3e-2, 0.1, 0.5, 3


def make_selection() -> sz.Selection:
    """Blocks, rows and columns in the upper layer of a Llama."""
    return mixed_selection(tiny_llama(layers=2), block_size=24)


def make_model(placement: Placement = "inplace", base: Path | None = None, dropout: float = 0.0) -> Any:
    """The same sparse Llama on every rank and in every run; read from the folder ``base``, if one is given."""
    from transformers import AutoModelForCausalLM

    # Sharded from the start, where a config of stage 3 exists.
    model = tiny_llama(layers=2) if base is None else AutoModelForCausalLM.from_pretrained(base)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    sz.sparsify(model, make_selection(), placement)
    return model.train()


def make_samples() -> list[TokenizedSample]:
    """Random tokens; prompts and responses of many lengths, so that every rank has another number of labels."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for _ in range(NUM_SAMPLES):
        prompt, length = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((2, 9), (12, 24)))
        ids = torch.randint(4, 384, (length,), generator=generator).tolist()
        samples.append(TokenizedSample(ids, [IGNORED] * prompt + ids[prompt:]))
    return samples


def loop_state(folder: Path, placement: Placement, stage: int) -> LoopState:
    """This project's own training loop over the samples."""
    rank, world_size = rank_and_world_size()
    config = RunConfig(
        model=ModelConfig(name_or_path="made here"),
        data=DataConfig(train="made here", group_by_length=False),
        selection=SelectionConfig(file="made here"),
        training=TrainingConfig(
            steps=STEPS,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=MICRO_BATCH,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup_fraction=0.0,
            weight_decay=DECAY,
            max_gradient_norm=CLIP,
        ),
        zero=ZeroConfig(stage=stage, placement=placement),  # type: ignore[arg-type]
        output=OutputConfig(folder=str(folder)),
    )
    world = World(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"), launcher="test")
    model = make_model(placement)
    return LoopState(
        config=config,
        world=world,
        engine=new_engine(model, config, world.world_size),
        make_engine=lambda model: new_engine(model, config, world.world_size),
        module_map=sz.default_module_map(tiny_llama(layers=2)),
        train=make_samples(),
        calibration=(),
        validation=(),
        pad_token_id=PAD,
        folder=RunFolder(folder),
        base=None,
        first_step=0,
        earlier={},
    )


def dealt_samples() -> list[TokenizedSample]:
    """The samples in the order in which our own loop deals them out, for trainers that keep it."""
    samples = make_samples()
    sampler = BatchSampler(NUM_SAMPLES, GLOBAL_BATCH, MICRO_BATCH, 1, 0, seed=0, shuffle=True)
    return [samples[index] for step in range(STEPS) for index in sampler.step(step).global_indices]


def own_losses(folder: Path, placement: Placement, stage: int) -> list[float]:
    """Losses of our own loop."""
    state = loop_state(folder, placement, stage)
    if dist.get_rank() == 0:
        with MetricsLog(folder) as log:
            train(state, log)
    else:
        train(state, None)
    dist.barrier()
    state.engine.destroy()
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


def as_rows(samples: Sequence[TokenizedSample]) -> list[dict[str, list[int]]]:
    """A data set for others."""
    return [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples]


def collate_rows(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Our own padding."""
    return collate_pad([TokenizedSample(row["input_ids"], row["labels"]) for row in rows], PAD)


def deepspeed_settings(stage: int, **sections: Any) -> dict[str, Any]:
    """A config as users of a Trainer write it."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        **sections,
    }


def configure_accelerate(*, deepspeed: bool) -> None:
    """Tell accelerate of the ranks. Without a GPU it would ask for none itself, and count one process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # What the Accelerator before has left, and the next one would take for its own.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
    else:
        if rank_and_world_size()[1] > 1:
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        PartialState(cpu=True)


def arguments(folder: Path, kind: Any = None, **changes: Any) -> Any:
    """``TrainingArguments`` that mean what the own loop's config means."""
    from transformers import TrainingArguments

    deepspeed = changes.get("deepspeed")
    configure_accelerate(deepspeed=deepspeed is not None)
    return (kind or TrainingArguments)(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": GLOBAL_BATCH // (MICRO_BATCH * rank_and_world_size()[1]),
            "train_sampling_strategy": "sequential",
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "weight_decay": DECAY,
            "max_grad_norm": CLIP,
            "optim": "adamw_torch",
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 3,
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "use_cpu": deepspeed is None,
            "accelerator_config": {"use_configured_state": True},
            **changes,
        },
    )


def losses_of(trainer: Any) -> list[float]:
    """What the trainer has logged."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def weights_are_values(model: nn.Module) -> bool:
    """Whether every weight holds its values, bit for bit."""
    return all(
        torch.equal(carrier.entries(kind), values)
        for _, carrier in carriers(model)
        for kind, values in carrier.values().items()
    )


def make_trainer(
    folder: Path,
    model: Any = None,
    *,
    placement: Placement = "inplace",
    base: Path | None = None,
    groups_by_kind: bool = False,
    **changes: Any,
) -> Any:
    """Hugging Face's Trainer with the callback.

    Args:
        folder: its output.
        model: sparse; made after the arguments, if it is not given.
        placement, base: of the model to make.
        groups_by_kind: our groups of parameters instead of the Trainer's two, with and without decay.
        **changes: of the arguments.
    """
    from transformers import Trainer

    found = arguments(folder, **changes)
    model = make_model(placement, base) if model is None else model
    optimizer = {"params": sz.parameter_groups(model), "lr": LEARNING_RATE, "weight_decay": DECAY}
    samples = dealt_samples()
    return Trainer(
        model,
        found,
        data_collator=collate_rows,
        train_dataset=as_rows(samples),
        eval_dataset=as_rows(samples[:GLOBAL_BATCH]),
        callbacks=[SparseZeroCallback()],
        optimizer_cls_and_kwargs=(torch.optim.AdamW, optimizer) if groups_by_kind else None,
    )


@contextmanager
def no_pickles() -> Iterator[None]:
    """Let every way into pickle, and torch's own ways to it, raise."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle is written or read")

    with pytest.MonkeyPatch.context() as patch:
        for module, names in (
            (pickle, ("dump", "dumps", "load", "loads", "Pickler", "Unpickler", "_Pickler", "_Unpickler")),
            (torch, ("save", "load")),
            (torch.serialization, ("save", "load", "_save", "_load", "_legacy_save", "_legacy_load")),
            # Objects that travel between ranks.
            (dist.distributed_c10d, ("_pickler", "_unpickler")),
        ):
            for name in names:
                patch.setattr(module, name, refuse)
        yield


def trainer_run(folder: Path, placement: Placement, **changes: Any) -> dict[str, Any]:
    """Train, look at what was stored, train the second half once more from the checkpoint between."""
    trainer = make_trainer(folder, placement=placement, **changes)
    model = trainer.model
    report: dict[str, Any] = {"placement": placement, "sharded_at_first": has_shards(model)}
    with no_pickles():
        trainer.train()
    report["losses"] = losses_of(trainer)
    report["written_back"] = weights_are_values(model)
    report["stored"] = stored(folder / "checkpoint-6")
    model.eval()
    batch = collate_rows(as_rows(make_samples()[:2]))
    with torch.no_grad():
        # Through the engine, which fetches what stage 3 has sharded.
        trained = trainer.model_wrapped(**batch).logits.clone()
    resumed = make_trainer(folder, placement=placement, **changes)
    with no_pickles():
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    report["resumed_losses"] = losses_of(resumed)
    report["num_groups"] = len(resumed.optimizer.param_groups)
    # A config of stage 3 that is still alive would shard the plain model, too.
    del trainer, resumed, model
    gc.collect()
    plain = tiny_llama(layers=2)
    sz.load_adapter(plain, folder / "checkpoint-6" / "adapter")
    with torch.no_grad():
        report["adapter_difference"] = float((plain(**batch).logits - trained).abs().max())
    report["final_adapter"] = (folder / "adapter" / "adapter.json").is_file()
    return report


def stored(folder: Path) -> list[str]:
    """Names of all files in a folder, without those in its adapter."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return sorted(name for name in files if not name.startswith("adapter/"))


def random_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Shuffled data, dropout, rates that change: losses with and without an interruption, and without dropout."""
    from transformers import set_seed

    changes = {
        "max_steps": 4,
        "save_steps": 2,
        "train_sampling_strategy": "random",
        # Else the order would follow from the seed that is set below.
        "data_seed": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        **changes,
    }
    report: dict[str, Any] = {}
    for name, dropout in (("whole", 0.3), ("without dropout", 0.0)):
        trainer = make_trainer(folder / name, make_model(dropout=dropout), **changes)
        # The Trainer has given every rank the same seed.
        set_seed(7 + rank_and_world_size()[0])
        trainer.train()
        report[name] = losses_of(trainer)
    resumed = make_trainer(folder / "whole", make_model(dropout=0.3), **changes)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    report["resumed"] = losses_of(resumed)
    report["rates"] = [row["learning_rate"] for row in resumed.state.log_history if "loss" in row]
    return report


def continued(folder: Path, checkpoint: Path, placement: Placement, **changes: Any) -> list[float]:
    """Losses of the steps that another Trainer takes from a checkpoint on."""
    trainer = make_trainer(folder, placement=placement, save_strategy="no", **changes)
    with no_pickles(), warnings.catch_warnings():
        # Another number of ranks, another stage: all that is random goes on in another way.
        warnings.simplefilter("ignore", RandomStatesWarning)
        trainer.train(resume_from_checkpoint=str(checkpoint))
    return losses_of(trainer)[3:]


def best_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Three steps, of whose checkpoints the first one counts as the best and is loaded at the end."""
    model = make_model()
    trainer = make_trainer(
        folder,
        model,
        **{
            "max_steps": 3,
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "greater_is_better": True,
            **changes,
        },
    )
    trainer.train()
    values = load_file(folder / "checkpoint-1" / "adapter" / "adapter_model.safetensors")
    last = load_file(folder / "checkpoint-3" / "adapter" / "adapter_model.safetensors")
    at_end = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {
        "best_is_first": str(trainer.state.best_model_checkpoint).endswith("checkpoint-1"),
        "values_are_best": all(torch.equal(values[name], at_end[name]) for name in values),
        "values_had_moved_on": any(not torch.equal(values[name], last[name]) for name in values),
        "written_back": weights_are_values(model),
    }


def trainers(folder: Path, own: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's Trainer with and without DeepSpeed, beside our own loop."""
    base = folder / "base"
    if dist.get_rank() == 0:
        tiny_llama(layers=2).save_pretrained(base)
    report: dict[str, Any] = {}
    for placement, stage in (("inplace", 2), ("delta", 3)):
        own[placement] = own_losses(folder / f"own_{placement}", placement, stage)  # type: ignore[arg-type]
    for name, placement, changes in (
        ("stage 0", "inplace", {"deepspeed": deepspeed_settings(0)}),
        ("stage 2", "inplace", {"deepspeed": deepspeed_settings(2)}),
        # Its own groups of parameters.
        ("stage 3 inplace", "inplace", {"deepspeed": deepspeed_settings(3), "groups_by_kind": True}),
        # Sharded while it is loaded, by transformers.
        ("stage 3 delta", "delta", {"deepspeed": deepspeed_settings(3), "base": base}),
        ("data parallel", "inplace", {}),
    ):
        report[name] = trainer_run(folder / name, placement, **changes)  # type: ignore[arg-type]
    for name, source, placement, zero_stage in (
        ("stage 3", "stage 2", "inplace", 3),
        ("stage 0", "stage 3 delta", "delta", 0),
        ("data parallel", "stage 3 inplace", "inplace", None),
        ("stage 1", "data parallel", "inplace", 1),
    ):
        spread: dict[str, Any] = (
            {"groups_by_kind": True} if zero_stage is None else {"deepspeed": deepspeed_settings(zero_stage)}
        )
        checkpoint = folder / source / "checkpoint-3"
        report[source]["continued"] = continued(folder / f"to {name}", checkpoint, placement, **spread)  # type: ignore[arg-type]
    scheduler = {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    }
    report["random"] = random_run(folder / "random", deepspeed=deepspeed_settings(2, scheduler=scheduler))
    report["stage 2"]["best"] = best_run(folder / "best", deepspeed=deepspeed_settings(2))
    return report


def error_of(attempt: Callable[[], Any]) -> str:
    """What is refused, in its own words; empty when nothing is."""
    try:
        attempt()
    except sz.InputError as error:
        return str(error)
    return ""


def refusals(folder: Path) -> dict[str, str]:
    """What is refused when a Trainer with a DeepSpeed config is made, before there is an engine."""
    from transformers import Trainer

    model = make_model()
    optimizer = torch.optim.AdamW(sz.parameter_groups(model), lr=LEARNING_RATE)
    found = arguments(folder, deepspeed=deepspeed_settings(2))
    callbacks = [SparseZeroCallback()]
    dropped = error_of(lambda: Trainer(model, found, optimizers=(optimizer, None), callbacks=callbacks))
    split = deepspeed_settings(2, tensor_parallel={"autotp_size": 2})
    return {"optimizers": dropped, "autotp": error_of(lambda: make_trainer(folder, deepspeed=split))}


def sft_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """TRL's SFTTrainer on the same samples, tokenized already; the second half once more from its checkpoint."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.models.tiny import tiny_tokenizer

    report: dict[str, Any] = {}
    for name, checkpoint in (("losses", None), ("resumed_losses", str(folder / "checkpoint-3"))):
        trainer = SFTTrainer(
            make_model(),
            arguments(folder, SFTConfig, max_length=None, bf16=False, **changes),
            train_dataset=Dataset.from_list(as_rows(dealt_samples())),
            processing_class=tiny_tokenizer(),
            callbacks=[SparseZeroCallback()],
        )
        with no_pickles():
            trainer.train(resume_from_checkpoint=checkpoint)
        report[name] = losses_of(trainer)
    return {**report, "stored": stored(folder / "checkpoint-6")}


def accelerate_losses(
    folder: Path, start: int, end: int, *, stage: int | None, check: Callable[[Any, Any], Any] | None = None
) -> tuple[list[float], Any]:
    """A loop of one's own on accelerate: its losses from one step to another, and the model.

    Args:
        folder: read where ``start`` is not 0, and written at the end.
        start, end: steps.
        stage: of ZeRO; None: without DeepSpeed.
        check: called with the accelerator and the prepared model before the first step.
    """
    from accelerate import Accelerator, DeepSpeedPlugin
    from torch.utils.data import DataLoader

    _, world_size = rank_and_world_size()
    accumulation = GLOBAL_BATCH // (MICRO_BATCH * world_size)
    configure_accelerate(deepspeed=stage is not None)
    if stage is None:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    else:
        plugin = DeepSpeedPlugin(
            zero_stage=stage, gradient_accumulation_steps=accumulation, gradient_clipping=CLIP, zero3_init_flag=False
        )
        accelerator = Accelerator(deepspeed_plugin=plugin)
    model = make_model()
    optimizer: Any = torch.optim.AdamW(sz.parameter_groups(model), lr=LEARNING_RATE, weight_decay=DECAY)
    scheduler: Any = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    todo = dealt_samples()[start * GLOBAL_BATCH : end * GLOBAL_BATCH]
    loader: Any = DataLoader(as_rows(todo), batch_size=MICRO_BATCH, collate_fn=collate_rows)  # type: ignore[arg-type]
    prepared, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    attach_accelerator(accelerator)
    if start:
        with no_pickles():
            accelerator.load_state(str(folder))
    if check is not None:
        check(accelerator, prepared)
    losses: list[float] = []
    total = torch.zeros(())
    for number, batch in enumerate(loader):
        step, micro_step = divmod(number, accumulation)
        tokens = response_tokens(todo[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH])
        with accelerator.accumulate(prepared):
            share = response_nll(prepared, batch) / tokens
            # accelerate divides by the steps, DeepSpeed averages over the ranks.
            accelerator.backward(share * accumulation * world_size)
            if stage is None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        total += share.detach()
        if micro_step == accumulation - 1:
            if dist.is_initialized():
                dist.all_reduce(total)
            losses.append(total.item())
            total.zero_()
    with no_pickles():
        accelerator.save_state(str(folder))
    return losses, model


def accelerate_run(folder: Path) -> dict[str, Any]:
    """Three steps at stage 2, and three of another engine at stage 3."""
    first, _ = accelerate_losses(folder, 0, 3, stage=2)
    found = stored(folder)
    second, model = accelerate_losses(folder, 3, STEPS, stage=3)
    return {"losses": first + second, "stored": found, "inplace_in_shards": has_shards(model)}


def everything(folder: str) -> dict[str, Any]:
    """All trainers on these ranks, one after another."""
    from tests.integrations.parallel_workers import splits

    root = Path(folder)
    report: dict[str, Any] = {"own": {}, "folder": folder}
    report["trainer"] = trainers(root, report["own"])
    report["accelerate"] = accelerate_run(root / "accelerate")
    if importlib.util.find_spec("trl") is not None:
        report["sft"] = sft_run(root / "sft", deepspeed=deepspeed_settings(2))
    report["refusals"] = refusals(root / "refusals")
    report["splits"] = splits(root)
    return report


def run_snippets(folder: str, snippets: list[str]) -> None:
    """Run pieces of Python one after another in ``folder``, with the data that they speak of."""
    from datasets import Dataset

    os.chdir(folder)
    rows = as_rows([TokenizedSample(sample.input_ids[:12], sample.labels[:12]) for sample in make_samples()])
    names: dict[str, Any] = {
        "train_dataset": rows,
        "calibration_batches": [collate_rows(rows[:4])],
        "texts": Dataset.from_list([{"text": "Tom has 12 apples and buys 7 more."}] * 16),
        "loader": torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=collate_rows),  # type: ignore[arg-type]
    }
    for code in snippets:
        configure_accelerate(deepspeed=True)
        exec(code, names)


def run_optimizer_snippet(code: str) -> str:
    """Run a piece of Python that makes an engine, and a step with it; which optimizer it has."""
    model = tiny_llama(layers=1)
    region = sz.RegionConfig(kind="row", modules=("*.q_proj",), per_matrix=2)
    sz.sparsify(model, sz.select(model, None, sz.SelectionConfig(regions=(region,), score="magnitude")))
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}, "steps_per_print": 10**9}
    names: dict[str, Any] = {"sz": sz, "model": model, "deepspeed_config": settings}
    exec(code, names)
    tokens = torch.arange(3, 27).reshape(2, 12)
    names["engine"].backward(names["engine"](input_ids=tokens, labels=tokens).loss)
    names["engine"].step()
    return type(names["engine"].optimizer.optimizer).__name__
