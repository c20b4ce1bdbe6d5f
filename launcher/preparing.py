"""What must be right and ready before training: checks without cost, then model, data, selection, engine?"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from launcher.config import RunConfig
from launcher.deepspeed_config import check_own_config, deepspeed_config
from launcher.run_folder import RunFolder, check_same_run, find_start
from launcher.world import World
from models.base_identity import base_identity
from models.collate import collate
from models.data import SampleSet, TokenizedSample, load_records, load_samples
from models.families import check_not_fused, module_map
from models.gather import gather_json
from models.loading import check_tokenizer_fits, load_model, load_tokenizer, model_folder, validate_model_source
from models.loss import response_nll
from models.sampler import BatchSampler
from sparse_zero.checkpoint.checkpoint import Checkpoint, read_checkpoint
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.collectives import failing_together
from sparse_zero.errors import InputError
from sparse_zero.layers.sparsify import check_fits, sparsify
from sparse_zero.selection.select import check_selection, select
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.engine import initialize

_DTYPE_OF_PRECISION = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(kw_only=True)
class Phases:
    """Seconds of each phase of a run, added up by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the duration of the block to phase ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclass(kw_only=True)
class Prepared:
    """A loaded run, before its model is sparse."""

    config: RunConfig
    folder: RunFolder
    model: Any
    tokenizer: Any
    train: SampleSet
    validation: SampleSet | None
    test: list[dict[str, str]]
    base: BaseIdentity
    checkpoint: Checkpoint | None
    checkpoint_path: Path | None


def check_run(config: RunConfig) -> None:
    """Everything that can be checked without loading a model or writing a file.

    Raises:
        InputError: the first thing found wrong.
    """
    check_own_config(config)
    wanted = _DTYPE_OF_PRECISION[config.training.precision]
    if config.model.dtype != wanted:
        raise InputError(
            f"training.precision is {config.training.precision} but model.dtype is {config.model.dtype}: "
            f"set model.dtype to {wanted}, or training.precision to match"
        )
    if config.training.precision != "fp32" and not torch.cuda.is_available():
        warnings.warn(
            f"training.precision {config.training.precision} on a CPU is slow, and fp16 does not run: "
            "fp32 is the choice here",
            stacklevel=2,
        )
    if config.output.evaluate and config.data.test is None:
        raise InputError("output.evaluate is true but data.test is missing: name the test data, or set it to false")
    path = Path(config.output.folder)
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise InputError(f"output.folder is {path}, but {existing} is a file: name another folder")
    folder = RunFolder(path)
    check_same_run(folder, config)
    find_start(folder, config)
    validate_model_source(config.model)


def prepare(config: RunConfig, world: World) -> Prepared:
    """Load tokenizer, data, model and, on a resumed run, its checkpoint. Collective.

    Raises:
        InputError: something named by the config cannot be used; nothing has been written then.
    """
    folder = RunFolder(config.output.folder)
    base: BaseIdentity | None = None
    with failing_together():
        check_run(config)
        checkpoint_path = find_start(folder, config)
        checkpoint = None if checkpoint_path is None else read_checkpoint(checkpoint_path)
        tokenizer = load_tokenizer(config.model)
        train = load_samples(config.data, tokenizer, "train")
        validation = load_samples(config.data, tokenizer, "validation") if config.data.validation else None
        test = load_records(config.data, "test") if config.data.test and config.output.evaluate else []
        model = load_model(config.model)
        check_tokenizer_fits(model, tokenizer)
        check_not_fused(model, tuple(pattern for region in config.selection.regions for pattern in region.modules))
        if checkpoint is None:
            check_selection(model, config.selection, module_map(model))
        else:
            check_fits(model, checkpoint.selection)
        if world.is_main:
            base = base_identity(model_folder(config.model), config.model.gguf_file)
    found = gather_json({"name": base.name, "sha256": base.sha256} if base else None)[0]
    base = BaseIdentity(name=found["name"], sha256=found["sha256"])
    if checkpoint is not None and checkpoint.base is not None and checkpoint.base.sha256 != base.sha256:
        raise InputError(
            f"{checkpoint_path} was trained on the base {checkpoint.base.name} ({checkpoint.base.sha256[:12]}), not on "
            f"{base.name} ({base.sha256[:12]}): load that base, or start in another output.folder"
        )
    model.to(world.device)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Prepared(
        config=config,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        test=test,
        base=base,
        checkpoint=checkpoint,
        checkpoint_path=checkpoint_path,
    )


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills padded batches; labels and attention hide it."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def calibration_batches(
    config: RunConfig, samples: Sequence[TokenizedSample], pad_id: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of training data, the same on every rank and at every world size."""
    selection = config.selection
    size = min(selection.calibration_batch_size, len(samples))
    sampler = BatchSampler(len(samples), size, size, 1, 0, selection.seed, True)
    for step in range(selection.calibration_batches):
        chosen = [samples[index] for index in sampler.step(step).global_indices]
        batch = collate(chosen, batching=config.data.batching, pad_token_id=pad_id)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def calibration_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean loss per response token of a micro-batch."""
    return response_nll(model, batch) / (batch["labels"][:, 1:] != -100).sum().clamp(min=1)


def choose_selection(prepared: Prepared, world: World) -> Selection:
    """Calibrate and select. Collective; a progress bar on rank 0."""
    from rich.console import Console
    from rich.progress import Progress

    config = prepared.config
    batches = calibration_batches(config, prepared.train.samples, pad_token_id(prepared.tokenizer), world.device)
    console = Console(stderr=True, quiet=not (world.is_main and config.selection.needs_data))
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("calibrating", total=config.selection.calibration_batches)
        prepared.model.train()
        return select(
            prepared.model,
            batches if config.selection.needs_data else None,
            config.selection,
            calibration_loss,
            module_map=module_map(prepared.model),
            on_batch=lambda index: progress.update(task, completed=index + 1),
        )


def make_engine(prepared: Prepared, selection: Selection, world: World) -> Any:
    """Sparsify the model and wrap it in a DeepSpeed engine. Collective."""
    config = prepared.config
    training = config.training
    sparsify(prepared.model, selection, config.zero.placement, module_map=module_map(prepared.model))
    engine, *_ = initialize(
        model=prepared.model,
        config=deepspeed_config(config, world.world_size),
        optimizer=lambda groups: torch.optim.AdamW(
            groups,
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            eps=training.epsilon,
            weight_decay=training.weight_decay,
        ),
    )
    return engine
