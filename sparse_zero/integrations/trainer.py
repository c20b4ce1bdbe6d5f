"""How does a sparsified model train inside Hugging Face's Trainer, or a trainer derived from it?

model = AutoModelForCausalLM.from_pretrained(...)
selection = sz.select(model, batches, config)
sz.sparsify(model, selection)
trainer = Trainer(model, arguments, callbacks=[SparseZeroCallback()], ...)

transformers is imported when a callback is made, and nowhere else in the library.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Self

from torch import nn

from sparse_zero.checkpoint.adapter import save_adapter
from sparse_zero.checkpoint.random_states import RandomStates, set_random_states
from sparse_zero.errors import InputError
from sparse_zero.integrations import trainer_checkpoint, trainer_compat
from sparse_zero.integrations.loop_state import ADAPTER_FOLDER, PlainEngine
from sparse_zero.integrations.save_pretrained import refuse_save_pretrained
from sparse_zero.layers.sparse_linear import SparseLinear
from sparse_zero.layers.sparsify import trainable_parameters, write_back
from sparse_zero.zero import compat
from sparse_zero.zero.config import Rounding
from sparse_zero.zero.engine import attach, write_values
from sparse_zero.zero.unsupported import check_not_split


def _distribution() -> tuple[str, dict[str, Any] | None]:
    """How accelerate, which every Trainer runs on, spreads the model; and DeepSpeed's config, if it is in use."""
    state = trainer_compat.library("accelerate.state").AcceleratorState()
    plugin = state.deepspeed_plugin
    return state.distributed_type.value, None if plugin is None else plugin.deepspeed_config


def _head_is_bypassed(arguments: Any) -> str | None:
    """What computes the loss from the output head's dense weight, without calling the head; None: nothing does."""
    if any(each.__module__.startswith("trl.") for each in type(arguments).__mro__):
        return "TRL"
    return "use_liger_kernel" if getattr(arguments, "use_liger_kernel", False) else None


def check_trainer(arguments: Any, model: Any, optimizer: Any, rounding: Rounding = "nearest") -> None:
    """Refuse what a Trainer cannot do with a sparsified model, before it has begun; alike on every rank.

    Args:
        arguments: the Trainer's ``TrainingArguments``.
        model: the Trainer's.
        optimizer: the one that was handed to the Trainer, if any.
        rounding: the callback's.

    Raises:
        InputError: names the argument, its value and the remedy.
    """
    trainable_parameters(model)  # Raises without any.
    distribution, settings = _distribution()
    if settings is not None:
        check_not_split(model, settings)
        if optimizer is not None:
            raise InputError(
                "optimizers=(...) is dropped by the Trainer under DeepSpeed: pass optimizer_cls_and_kwargs="
                "(torch.optim.AdamW, {'params': sz.parameter_groups(model), 'lr': ...}) instead"
            )
    elif distribution != "NO" and not distribution.startswith("MULTI_"):
        raise InputError(
            f"the Trainer spreads the model by {distribution}, under which values cannot be written back: use a "
            "DeepSpeed config, or one process per GPU"
        )
    elif rounding != "nearest":
        raise InputError(f"rounding is {rounding!r} without DeepSpeed, whose fp32 masters it rounds: use 'nearest'")
    if arguments.push_to_hub and arguments.hub_strategy != "end":
        raise InputError(
            f"hub_strategy is {arguments.hub_strategy.value!r}: the Trainer would upload its arguments as a pickle "
            "with each checkpoint: use hub_strategy='end'"
        )
    if arguments.save_on_each_node:
        raise InputError(
            "save_on_each_node is set, and a checkpoint is written once, by rank 0: put output_dir on a file system "
            "that all nodes share"
        )
    if arguments.n_gpu > 1:
        raise InputError(
            f"the Trainer would copy the model to {arguments.n_gpu} GPUs in every step, and train copies of the "
            "values: start one process per GPU (torchrun, accelerate launch or deepspeed)"
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    bypassed_by = _head_is_bypassed(arguments)
    if bypassed_by is not None and isinstance(head, SparseLinear):
        raise InputError(
            f"the output head has values, and {bypassed_by} computes the loss from its dense weight, without them: "
            "leave the head (lm_head) out of the selection"
        )


def _check_sequence_parallel(engine: Any) -> None:
    """Refuse sequence parallelism below stage 3, where the Trainer's loss and DeepSpeed's gradients do not fit.

    Each rank's loss is the whole sequence's, gathered with its gradient: summed once more over the ranks, as stages 0
    to 2 do, gradients are too large by their number. Stage 3 averages.

    Raises:
        InputError: names the stage.
    """
    size, stage = engine.sequence_parallel_size, engine.zero_optimization_stage()
    if size > 1 and stage < 3:
        raise InputError(
            f"sequence parallelism over {size} ranks at zero stage {stage}: the Trainer's gradients would be {size} "
            "times too large (gradient clipping and Adam's epsilon see it); use stage 3"
        )


@cache
def _of_transformers(cls: type) -> type:
    """``cls`` with the classes that a Trainer asks for; importing them takes seconds and may print."""
    callbacks = trainer_compat.library("transformers.trainer_callback")
    return type(cls.__name__, (cls, callbacks.TrainerCallback, callbacks.ExportableState), {"__doc__": cls.__doc__})


class SparseZeroCallback:
    """Writes the values back after each optimizer step, and stores and loads in the place of the Trainer.

    With DeepSpeed it attaches to the Trainer's engine, see :func:`sparse_zero.attach`; without, it writes back
    itself. ``checkpoint-<step>`` is a checkpoint of this library with the Trainer's state, see
    :mod:`sparse_zero.integrations.trainer_checkpoint`; it continues at any number of ranks and ZeRO stage, with
    DeepSpeed or without. No pickle is written or read. The adapter is in each checkpoint, and once more in the output
    folder when training ends.

    The first one that is made wraps some methods of transformers' Trainer, see
    :mod:`sparse_zero.integrations.trainer_compat`; Trainers without a callback of this kind go on as they did.

    Args:
        rounding: see :func:`sparse_zero.attach`; with DeepSpeed only, which has the fp32 masters it needs.
        rounding_seed: see :func:`sparse_zero.attach`.

    Raises:
        InputError: this version of transformers is not known; or, when the Trainer is made or begins to train, see
            :func:`check_trainer`.
    """

    def __new__(cls, **options: Any) -> Self:
        """An instance of transformers' callbacks too, which are imported only now."""
        trainer_compat.wrap_methods(_callback_of, _METHODS)
        wanted: Any = cls
        made: Self = super().__new__(cls if hasattr(cls, "on_epoch_begin") else _of_transformers(wanted))
        return made

    def __init__(self, *, rounding: Rounding = "nearest", rounding_seed: int = 0) -> None:
        self.rounding: Rounding = rounding
        self.rounding_seed = rounding_seed
        # Of the present run, or the last one: DeepSpeed's or a PlainEngine.
        self.engine: Any = None
        # This rank's of the checkpoint that the present run continues from.
        self.random_states: RandomStates | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps of this callback in each checkpoint."""
        return {"args": {"rounding": self.rounding, "rounding_seed": self.rounding_seed}, "attributes": {}}

    def engine_over(self, model: nn.Module) -> Any:
        """The engine of the last run, if that was of ``model``; else None."""
        return self.engine if self.engine is not None and self.engine.module is model else None

    def attach_to(self, trainer: Any) -> None:
        """Engine and optimizer are made: write back after their steps. Collective at stage 3."""
        model = trainer.model
        if _distribution()[1] is None:
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            self.engine = PlainEngine(module=model, optimizer=optimizer)
        else:
            self.engine = compat.engine_of(model)
            if self.engine is None:
                raise RuntimeError("the Trainer's DeepSpeed engine was not found on its model: was the model wrapped?")
            _check_sequence_parallel(self.engine)
            attach(self.engine, rounding=self.rounding, rounding_seed=self.rounding_seed)
        # Also of an engine that has trained before.
        write_values(self.engine)

    def on_init_end(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """The Trainer is made: refuse what cannot work."""
        check_trainer(args, model, optimizer, self.rounding)
        refuse_save_pretrained(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """After a real step, not after the micro-batches before it."""
        if isinstance(self.engine, PlainEngine):
            write_back(model)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Training has ended, perhaps with the values of its best checkpoint. Collective."""
        write_values(self.engine)
        if args.save_strategy != "no":
            save_adapter(self.engine, Path(args.output_dir) / ADAPTER_FOLDER)


def _callback_of(trainer: Any) -> SparseZeroCallback | None:
    return next((each for each in trainer_compat.callbacks_of(trainer) if isinstance(each, SparseZeroCallback)), None)


# What follows takes the place of the Trainer's methods of these names.


def _train(
    callback: SparseZeroCallback,
    own: Callable[..., Any],
    trainer: Any,
    resume_from_checkpoint: str | bool | None = None,
    trial: Any = None,
    ignore_keys_for_eval: list[str] | None = None,
) -> Any:
    if trial is not None:
        raise InputError("a Trainer's hyperparameter search is not supported: make one Trainer for each trial")
    if trainer.args.save_strategy != "no":
        trainer_checkpoint.check_output_folder(Path(trainer.args.output_dir))
    checkpoint = trainer_checkpoint.choose(trainer, resume_from_checkpoint) if resume_from_checkpoint else None
    # On the Trainer: it may make its callbacks anew from their states.
    trainer.sparse_zero_checkpoint = checkpoint
    path = None if checkpoint is None else str(checkpoint.folder)
    return own(resume_from_checkpoint=path, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)


def _prepare_for_training(
    callback: SparseZeroCallback,
    own: Callable[..., Any],
    trainer: Any,
    max_steps: int,
    train_dataloader: Any,
    resume_from_checkpoint: str | None,
) -> Any:
    # Another model than at first, where the Trainer was given model_init.
    check_trainer(trainer.args, trainer.model, None, callback.rounding)
    refuse_save_pretrained(trainer.model)
    # Told to continue from nothing, it loads nothing.
    prepared = own(max_steps, train_dataloader, None)
    callback.attach_to(trainer)
    callback.random_states = None
    if resume_from_checkpoint is not None:
        callback.random_states = trainer_checkpoint.load(trainer, callback.engine, trainer.sparse_zero_checkpoint)
    return prepared


def _load_from_checkpoint(
    callback: SparseZeroCallback, own: Callable[..., Any], trainer: Any, resume_from_checkpoint: str, model: Any = None
) -> None:
    """Nothing yet: values come with the rest, when there is an optimizer."""


def _load_rng_state(
    callback: SparseZeroCallback, own: Callable[..., Any], trainer: Any, checkpoint: str | None
) -> None:
    if callback.random_states is not None:
        set_random_states(callback.random_states)


def _load_best_model(callback: SparseZeroCallback, own: Callable[..., Any], trainer: Any) -> None:
    trainer_checkpoint.load_best(trainer, callback.engine)


def _save_checkpoint(
    callback: SparseZeroCallback, own: Callable[..., Any], trainer: Any, model: Any, trial: Any
) -> None:
    trainer_checkpoint.save(trainer, callback.engine)


def _save_model(
    callback: SparseZeroCallback,
    own: Callable[..., Any],
    trainer: Any,
    output_dir: str | None = None,
    _internal_call: bool = False,
) -> None:
    folder = Path(trainer.args.output_dir if output_dir is None else output_dir)
    trainer_checkpoint.save_model(trainer, callback.engine_over(trainer.model), folder)
    if trainer.args.push_to_hub and not _internal_call:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


_METHODS: dict[str, Callable[..., Any]] = {
    "train": _train,
    "save_model": _save_model,
    "_prepare_for_training": _prepare_for_training,
    "_load_from_checkpoint": _load_from_checkpoint,
    "_load_rng_state": _load_rng_state,
    "_load_best_model": _load_best_model,
    "_save_checkpoint": _save_checkpoint,
}
