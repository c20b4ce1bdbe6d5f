"""What must be right and ready before training: checks without cost, then model, data, selection, engine?"""

import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from launcher.calibration_data import check_calibration_data, record_calibration_data
from launcher.config import RunConfig
from launcher.config_checks import check_config, score_names, trained_kinds
from launcher.deepspeed_config import (
    check_can_continue,
    check_can_train_here,
    deepspeed_config,
    validate_with_deepspeed,
)
from launcher.exporting import labels_of, save_model_folder
from launcher.kept_base import begin_kept, check_is_base_of, check_kept, earlier_selection, kept_model
from launcher.loss_chunks import calibration_chunk
from launcher.memory.measuring import RunMemory
from launcher.prefix_check import check_prefix_cache
from launcher.pulse import Pulse
from launcher.resuming import choose_start, clear_interrupted, find_start
from launcher.run_folder import RunFolder, check_same_run, check_writable, kept_folder
from launcher.same_input import check_same_input
from launcher.shared_folder import share_newest
from launcher.world import World
from models.base_identity import base_identity, begin_base_identity
from models.chunked_loss import warn_of_chunks
from models.classification import check_context, set_up_classifier
from models.classified_data import Labels, load_classified
from models.collate import collate
from models.data import Sample, SampleSet, load_records, load_samples
from models.families import check_can_pack, check_not_fused, module_map
from models.gather import gather_json
from models.heads import check_head_trained, head_text, trained_entirely
from models.liger import check_kernels, use_kernels
from models.loading import (
    ModelConfig,
    check_tokenizer_fits,
    checkpoint_activations,
    load_model,
    load_tokenizer,
    model_folder,
    pad_token_id,
    validate_model_source,
)
from models.loss import batch_loss, batch_targets
from models.problems import check_problems
from models.sampler import BatchSampler
from models.sharded_loading import ShardedLoadingWarning, load_sharded
from sparse_zero.checkpoint.checkpoint import Checkpoint
from sparse_zero.checkpoint.folders import MANIFEST, file_sha256
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.collectives import failing_together
from sparse_zero.errors import InputError
from sparse_zero.layers.kernels import check_kernels_here, set_kernels
from sparse_zero.layers.sparsify import check_fits, sparsify
from sparse_zero.module_map import ModuleMap
from sparse_zero.optional import require
from sparse_zero.reselection.migrate import kinds_of
from sparse_zero.selection.config import SelectionConfig
from sparse_zero.selection.full_calibration import check_world_size
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.scores import resolve_score
from sparse_zero.selection.select import check_selection, choose_regions, entire_names, score_regions
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.engine import initialize
from sparse_zero.zero.inference import sharded_forward
from sparse_zero.zero.optimizers import build_optimizer, check_available, check_kinds, check_modules
from sparse_zero.zero.unsupported import offload_device


@dataclass
class Phases:
    """Seconds of each phase of a run, added up by name."""

    # Told which phase it is.
    pulse: Pulse = field(default_factory=Pulse)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the duration of the block to phase ``name``."""
        started = time.perf_counter()
        try:
            with self.pulse.phase(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclass(kw_only=True)
class Prepared:
    """A loaded run, before its model is sparse."""

    config: RunConfig
    folder: RunFolder
    model: Any
    # Of the dense model.
    module_map: ModuleMap
    tokenizer: Any
    train: SampleSet
    validation: SampleSet | None
    test: list[dict[str, str]]
    # What scores are calculated on; None: the training data.
    calibration: SampleSet | None
    # What the base and the tuned model are asked to predict, to see what was forgotten.
    forgetting: SampleSet | None
    # What is trained from; calibration may replace it, and writes the new one then.
    base: BaseIdentity
    checkpoint: Checkpoint | None
    # Of an earlier start without a checkpoint, where calibration is not to be done twice since its weights were kept.
    selection: Selection | None
    # Of a classifier's data.
    labels: Labels | None = None

    @property
    def calibration_samples(self) -> Sequence[Sample]:
        """What scores are calculated on."""
        return (self.train if self.calibration is None else self.calibration).samples

    @property
    def resumes(self) -> bool:
        """Whether an earlier start has come as far as a selection that this one goes on with."""
        return self.checkpoint is not None or self.selection is not None


def check_run(config: RunConfig, *, continues: bool = True) -> None:
    """Everything that can be checked without loading a model or writing a file: of the config, and of this machine.

    Args:
        config: the run.
        continues: whether the run will write to its folder, so that what lies there must be the same run.

    Raises:
        InputError: the first thing found wrong.
    """
    check_config(config)
    check_can_train_here(config)
    if config.training.kernels == "liger":
        check_kernels(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    check_kernels_here(config.training.region_kernels)
    if config.training.precision != "fp32" and not torch.cuda.is_available():
        warnings.warn(
            f"training.precision {config.training.precision} is slow on most CPUs: fp32 is the choice here",
            stacklevel=2,
        )
    check_available(config.training.optimizer)
    for name in score_names(config.selection):
        resolve_score(name)
    if config.output.report:
        require("matplotlib", extra="plots", purpose="draw the report (output.report)")
    if config.output.tensorboard:
        require("tensorboard", extra="tracking", purpose="write the metrics for TensorBoard (output.tensorboard)")
    if continues:
        folder = RunFolder(config.output.folder)
        check_writable(folder)
        check_same_run(folder, config)
        check_kept(config, folder, resumes=find_start(folder, config) is not None)
    else:
        check_kept(config, None, resumes=False)
    validate_model_source(config.model)


def _load_data(
    config: RunConfig, source: ModelConfig, tokenizer: Any, *, is_selected: bool
) -> tuple[SampleSet, SampleSet | None, SampleSet | None, Labels | None]:
    """Training, validation and calibration samples, and of a classifier what their labels mean.

    Calibration data is read where it will choose something: a run that continues may have chosen already.
    """
    data = config.data
    chooses = config.calibrates and (not is_selected or config.selection.reselect is not None)
    validates, calibrates = data.validation is not None, data.calibration is not None and chooses
    if not source.classifies:
        validation = load_samples(data, tokenizer, "validation") if validates else None
        calibration = load_samples(data, tokenizer, "calibration") if calibrates else None
        return load_samples(data, tokenizer, "train"), validation, calibration, None
    records = load_records(data, "train")
    labels = labels_of(config, source, records)
    validation = load_classified(data, tokenizer, "validation", labels) if validates else None
    calibration = load_classified(data, tokenizer, "calibration", labels) if calibrates else None
    return load_classified(data, tokenizer, "train", labels, records), validation, calibration, labels


def _check_same_selection(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose selection was made by another config: it would win silently."""
    wanted = json.loads(json.dumps(dataclasses.asdict(config.selection)))
    found = checkpoint.selection.metadata.get("config")
    if config.selection.file is not None:
        if Selection.load(config.selection.file) != checkpoint.selection:
            raise InputError(
                f"{checkpoint.folder} has another selection than selection.file {config.selection.file}: "
                "name the same file, or start anew in another output.folder"
            )
    elif found is not None:
        # A setting that is younger than the checkpoint had its default.
        defaults = json.loads(json.dumps(dataclasses.asdict(SelectionConfig(file=""))))
        for key in [*wanted, *found]:
            had, has = found.get(key, defaults.get(key)), wanted.get(key)
            if had != has:
                raise InputError(
                    f"{checkpoint.folder} was selected with {key}={had!r}, and selection.{key} is {has!r}: continue "
                    "with the same selection, or start anew in another output.folder"
                )
        check_calibration_data(
            checkpoint.selection.metadata,
            config,
            f"{checkpoint.folder} was selected",
            "continue with the same, or start anew in another output.folder",
            named_only=True,
        )


def _agree_on_start(checkpoint: Checkpoint | None, earlier: Selection | None) -> None:
    """Raise on all ranks unless they all continue from the same checkpoint or selection, or start anew. Collective."""
    mine = None if earlier is None else earlier.digest()
    if checkpoint is not None:
        mine = file_sha256(checkpoint.folder / MANIFEST)
    everyone = gather_json(mine)
    different = [rank for rank, found in enumerate(everyone) if found != everyone[0]]
    if different:
        raise InputError(
            f"ranks {different} see another checkpoint or selection in output.folder than rank 0, or none: "
            "put output.folder on a file system that all nodes share"
        )


def _loads_sharded(config: RunConfig, *, is_selected: bool) -> bool:
    """Whether no rank may hold the whole model: at stage 3, but where something needs all of it first."""
    if config.zero.stage < 3:
        return False
    reason = None
    if config.model.quantization != "none":
        reason = f"model.quantization is {config.model.quantization!r}"
    elif config.selection.file is None and not is_selected and config.selection.calibration_weights == "full":
        reason = "selection.calibration_weights is 'full'"
    if reason is not None:
        warnings.warn(
            f"{reason}, which needs whole weights: at zero.stage 3 every rank holds the whole model until training "
            "starts, and shards it then",
            ShardedLoadingWarning,
            stacklevel=3,
        )
    return reason is None


def _agree_on_base(base: BaseIdentity | None) -> BaseIdentity:
    """Rank 0's on every rank. Collective."""
    return BaseIdentity(**gather_json(None if base is None else dataclasses.asdict(base))[0])


def check_can_select(
    config: RunConfig, model: Any, family: ModuleMap, checkpoint: Checkpoint | None, *, sharded: bool
) -> None:
    """Raise unless the model has what the run is to choose among, or has chosen already.

    Args:
        config: the run.
        model: dense or quantized.
        family: its module map.
        checkpoint: that the run continues from.
        sharded: whether every rank holds a part of the weights only.

    Raises:
        InputError: what does not fit.
    """
    check_not_fused(model, tuple(pattern for region in config.selection.regions for pattern in region.modules))
    check_modules(config.training.optimizer_config(), [name for name, _ in model.named_parameters()])
    if checkpoint is not None:
        check_fits(model, checkpoint.selection, retired=checkpoint.retired, sharded=sharded)
    elif config.selection.file is not None:
        chosen = Selection.load(config.selection.file)
        check_fits(model, chosen, sharded=sharded)
        check_head_trained(model, trained_entirely(chosen))
        check_kinds(config.training.optimizer_config(), sorted(kinds_of(chosen)))
    else:
        check_selection(model, config.selection, family)
        check_head_trained(model, entire_names(model, config.selection, family))


def prepare(
    config: RunConfig, world: World, *, continues: bool = True, check_model: Callable[..., None] = check_can_select
) -> Prepared:
    """Load tokenizer, data, model and, on a resumed run, its checkpoint. Collective.

    Args:
        config: the run.
        world: this process's place in it.
        continues: False for a selection only, which reads no checkpoint and writes no run folder.
        check_model: raises where the model does not have what is to be trained; called as :func:`check_can_select`.

    Raises:
        InputError: something named by the config cannot be used; nothing has been written then.
    """
    folder = RunFolder(config.output.folder)
    base: BaseIdentity | None = None
    with failing_together():
        check_run(config, continues=continues)
        validate_with_deepspeed(deepspeed_config(config, world.world_size), world.world_size)
        if continues and world.keeps_folder:
            clear_interrupted(folder)
    if continues and config.checkpoint.resume != "never":
        share_newest(folder, world)
    checkpoint = choose_start(folder, config) if continues else None
    with failing_together():
        if checkpoint is not None:
            check_can_continue(config)
            _check_same_selection(config, checkpoint)
        if config.selection.file is None and config.selection.calibration_weights == "full":
            check_world_size(config.selection.full_calibration, world.world_size)
        earlier = earlier_selection(config, folder) if continues and checkpoint is None else None
    _agree_on_start(checkpoint, earlier)
    source = config.model
    if earlier is not None or (checkpoint is not None and kept_folder(config) is not None):
        source = kept_model(config)
    is_selected = checkpoint is not None or earlier is not None
    sharded = _loads_sharded(config, is_selected=is_selected)
    model: Any
    with failing_together():
        tokenizer = load_tokenizer(config.model)
        # Beside data and model, which it does not wait for.
        base_folder = model_folder(source)
        head = head_text(source, base_folder, config.training.seed)
        identity = begin_base_identity(base_folder, source.gguf_file, head=head) if world.is_main else None
        train, validation, calibration, labels = _load_data(config, source, tokenizer, is_selected=is_selected)
        test = load_records(config.data, "test") if config.data.test and config.output.evaluate else []
        problems = test[: config.data.evaluation.limit]
        # Not kept: what is wrong with them is said before anything is trained.
        classified = load_classified(config.data, tokenizer, "test", labels, problems) if labels and problems else None
        # Measured by a run, and not where only a selection is made.
        asked = continues and config.data.forgetting is not None
        forgetting = load_samples(config.data, tokenizer, "forgetting") if asked else None
    if world.world_size > 1:
        read = {
            "data.train": train, "data.validation": validation, "data.calibration": calibration,
            "data.forgetting": forgetting, "data.test": problems if classified is None else classified,
        }  # fmt: skip
        check_same_input(config, source, read)
    with failing_together():
        model = None if sharded else load_model(source, head_seed=config.training.seed)
    if sharded:
        settings = deepspeed_config(config, world.world_size)
        model = load_sharded(source, settings, head_seed=config.training.seed)
    with failing_together():
        check_tokenizer_fits(model, tokenizer)
        if labels is not None:
            set_up_classifier(model, tokenizer, labels)
        if config.data.batching == "pack":
            check_can_pack(model)
        for found in (train, validation, calibration, forgetting, classified):
            if found is not None:
                check_context(model, found.lengths)
        if test and labels is None:
            data = config.data
            check_problems(model, tokenizer, test, data.evaluation, template=data.template, fields=data.fields)
        check_prefix_cache(config, model, train.lengths)
        family = module_map(model)
        check_model(config, model, family, checkpoint, sharded=sharded)
        if identity is not None:
            base = identity()
    base = _agree_on_base(base)
    if earlier is not None:
        check_is_base_of(earlier, base)
    if checkpoint is not None and checkpoint.base is not None and checkpoint.base.sha256 != base.sha256:
        raise InputError(
            f"{checkpoint.folder} was trained on the base {checkpoint.base.name} ({checkpoint.base.sha256[:12]}), not "
            f"on {base.name} ({base.sha256[:12]}): load that base, or start in another output.folder"
        )
    if not sharded:  # Shards are where they belong already.
        model.to(world.device)
    if config.training.kernels == "liger":
        use_kernels(model)
    set_kernels(config.training.region_kernels)
    if config.training.gradient_checkpointing:
        checkpoint_activations(model)
    return Prepared(
        config=config,
        folder=folder,
        model=model,
        module_map=family,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        test=test,
        calibration=calibration,
        forgetting=forgetting,
        base=base,
        checkpoint=checkpoint,
        selection=earlier,
        labels=labels,
    )


def calibration_batches(
    config: RunConfig, samples: Sequence[Sample], pad_id: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of calibration data, the same on every rank and at every world size."""
    selection = config.selection
    size = min(selection.calibration_batch_size, len(samples))
    sampler = BatchSampler(len(samples), size, size, 1, 0, selection.seed, True)
    for step in range(selection.calibration_batches):
        chosen = [samples[index] for index in sampler.step(step).global_indices]
        batch = collate(chosen, batching=config.data.batching, pad_token_id=pad_id)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def calibration_loss(config: RunConfig) -> Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]:
    """What gives the mean loss per response token, or per classified sample, of a micro-batch."""
    chunk = calibration_chunk(config)

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch_loss(model, batch, chunk=chunk) / batch_targets(batch).clamp(min=1)

    return loss


def _score_selection(prepared: Prepared, world: World) -> RegionScores:
    """Score every region that the config lets be chosen. Collective; a progress bar on rank 0."""
    from rich.console import Console
    from rich.progress import Progress

    config = prepared.config
    samples = prepared.calibration_samples
    batches = calibration_batches(config, samples, pad_token_id(prepared.tokenizer), world.device)
    console = Console(stderr=True, quiet=not (world.is_main and config.selection.needs_data))
    settings = deepspeed_config(config, world.world_size)
    with Progress(console=console, transient=True) as progress, sharded_forward(prepared.model, settings):
        task = progress.add_task("calibrating", total=config.selection.calibration_batches)

        def on_batch(index: int) -> None:
            progress.update(task, completed=index + 1)
            world.pulse.tick()

        prepared.model.train()
        with world.pulse.phase("calibrate", ticks=config.selection.needs_data):
            scores = score_regions(
                prepared.model,
                batches if config.selection.needs_data else None,
                config.selection,
                calibration_loss(config),
                module_map=prepared.module_map,
                on_batch=on_batch,
            )
    if kept_folder(config) is not None:
        prepared.base = _write_kept(prepared, world)
    scores.metadata["base"] = dataclasses.asdict(prepared.base)
    record_calibration_data(scores.metadata, config, content=True)
    return scores


def _write_kept(prepared: Prepared, world: World) -> BaseIdentity:
    """Write the weights that calibration has trained as a new base; its identity. Collective.

    Raises:
        InputError: something has been put into the folder since the start.
    """
    kept, base = kept_folder(prepared.config), None
    assert kept is not None
    with failing_together():
        if world.is_main:
            check_kept(prepared.config, prepared.folder, resumes=False)
            begin_kept(prepared.config, prepared.folder)
            save_model_folder(prepared.model, prepared.tokenizer, kept)
            base = base_identity(kept)
    return _agree_on_base(base)


def choose_selection(prepared: Prepared, world: World) -> tuple[Selection, RegionScores | None]:
    """Calibrate and choose, or read what is chosen already, without scores. Collective."""
    config = prepared.config
    if config.selection.file is not None:
        return Selection.load(config.selection.file), None
    if prepared.selection is not None:
        return prepared.selection, None
    scores = _score_selection(prepared, world)
    selection = choose_regions(prepared.model, scores, config.selection, module_map=prepared.module_map)
    selection.metadata["base"] = scores.metadata.get("base")
    record_calibration_data(selection.metadata, config)
    return selection, scores


def make_engine(prepared: Prepared, selection: Selection, world: World, memory: RunMemory) -> Any:
    """Sparsify the model, with the retired entries of the checkpoint, and wrap it in an engine. Collective."""
    sparsify(
        prepared.model,
        selection,
        prepared.config.zero.placement,
        retired=None if prepared.checkpoint is None else prepared.checkpoint.retired,
        module_map=prepared.module_map,
    )
    if world.is_main:
        warn_of_chunks(prepared.model, prepared.config.training.loss_chunk)
    memory.start(prepared.model)
    with memory.engine():
        engine = new_engine(prepared.model, prepared.config, world.world_size)
        memory.made(engine)
    return engine


def new_engine(model: Any, config: RunConfig, world_size: int, *, broadcast_weights: bool = False) -> Any:
    """A DeepSpeed engine over a sparsified model, with an optimizer of its own. Collective.

    Args:
        model: sparsified.
        config: of the run.
        world_size: ranks.
        broadcast_weights: False: every rank has read the same files, and the ranks compare their weights.
    """
    settings = deepspeed_config(config, world_size)
    offloaded = offload_device(settings, "offload_optimizer") is not None
    optimizer = config.training.optimizer_config()
    engine, *_ = initialize(
        model=model,
        config=settings,
        broadcast_weights=broadcast_weights,
        optimizer=lambda groups: build_optimizer(
            groups, optimizer, model=model, offloaded=offloaded, kinds=trained_kinds(config)
        ),
        rounding=config.zero.rounding,
        rounding_seed=config.training.seed,
    )
    return engine
