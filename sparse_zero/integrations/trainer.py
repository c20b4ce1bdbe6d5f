"""How does a sparsified model train inside Hugging Face's Trainer, or a trainer derived from it?

model = AutoModelForCausalLM.from_pretrained(...)
selection = sz.select(model, batches, config)
sz.sparsify(model, selection)
trainer = Trainer(model, arguments, callbacks=[SparseZeroCallback()], ...)

transformers is imported when a callback is made, and nowhere else in the library.
"""

import hashlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from torch import nn

from sparse_zero.checkpoint.adapter import save_adapter
from sparse_zero.checkpoint.conversion import model_fingerprints
from sparse_zero.errors import InputError
from sparse_zero.files import to_json
from sparse_zero.integrations.stored_values import store_values_only
from sparse_zero.layers.sparse_linear import SparseLinear
from sparse_zero.layers.sparsify import placement_of, selection_of, trainable_parameters, write_back
from sparse_zero.optional import require
from sparse_zero.zero import compat
from sparse_zero.zero.config import Rounding
from sparse_zero.zero.engine import attach, write_values
from sparse_zero.zero.unsupported import check_not_split

ADAPTER_FOLDER = "adapter"


def _library(module: str) -> ModuleType:
    return require(module, extra="trl", purpose="train inside a Trainer")


def _distribution() -> tuple[str, dict[str, Any] | None]:
    """How accelerate, which every Trainer runs on, spreads the model; and DeepSpeed's config, if it is in use."""
    state = _library("accelerate.state").AcceleratorState()
    plugin = state.deepspeed_plugin
    return state.distributed_type.value, None if plugin is None else plugin.deepspeed_config


def _identity(model: nn.Module) -> dict[str, str]:
    """What a checkpoint and a model must have in common for training to continue."""
    base = hashlib.sha256(to_json(model_fingerprints(model)).encode()).hexdigest()
    return {"selection": selection_of(model).digest(), "placement": placement_of(model), "base": base}


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
    callbacks = _library("transformers.trainer_callback")
    return type(cls.__name__, (cls, callbacks.TrainerCallback, callbacks.ExportableState), {"__doc__": cls.__doc__})


class SparseZeroCallback:
    """Writes the values back after each optimizer step, and saves them as an adapter with each checkpoint.

    With DeepSpeed it attaches to the Trainer's engine, see :func:`sparse_zero.attach`; without, it writes back
    itself. Checkpoints hold values only; ``adapter/`` in them is written by :func:`sparse_zero.save_adapter`, and once
    more in the output folder when training ends. A run that continues from a checkpoint is refused where selection,
    placement or base are not those it was written with.

    Args:
        rounding: see :func:`sparse_zero.attach`; with DeepSpeed only, which has the fp32 masters it needs.
        rounding_seed: see :func:`sparse_zero.attach`.

    Raises:
        InputError: when the Trainer is made or begins to train, see :func:`check_trainer`.
    """

    def __new__(cls, **options: Any) -> Self:
        """An instance of transformers' callbacks too, which are imported only now."""
        wanted: Any = cls
        made: Self = super().__new__(cls if hasattr(cls, "on_epoch_begin") else _of_transformers(wanted))
        return made

    def __init__(self, *, rounding: Rounding = "nearest", rounding_seed: int = 0) -> None:
        self.rounding: Rounding = rounding
        self.rounding_seed = rounding_seed
        # The engine of the present run; None without DeepSpeed.
        self.engine: Any = None
        # Of the model, once training has begun; it travels in the Trainer's own state file.
        self.identity: dict[str, str] = {}

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps of this callback in each checkpoint."""
        options = {"rounding": self.rounding, "rounding_seed": self.rounding_seed}
        return {"args": options, "attributes": {"identity": self.identity}}

    def _check_continues(self, state: Any, identity: dict[str, str]) -> None:
        """Raise unless the checkpoint that ``state`` was read from belongs to the model."""
        if state.global_step == 0:
            return
        stored = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("identity")
        if not stored:
            raise InputError(
                f"the checkpoint of step {state.global_step} was not written with {type(self).__name__}: start anew"
            )
        remedies = {
            "selection": "sparsify with the selection in the checkpoint's adapter folder",
            "placement": "sparsify with that placement",
            "base": "load the base it was trained on, in a dtype as wide",
        }
        for what, remedy in remedies.items():
            if stored[what] != identity[what]:
                raise InputError(
                    f"the checkpoint of step {state.global_step} has another {what} ({stored[what][:12]}) than the "
                    f"model ({identity[what][:12]}): {remedy}"
                )

    def on_init_end(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """The Trainer is made: refuse what cannot work, and keep the base out of what is stored."""
        check_trainer(args, model, optimizer, self.rounding)
        store_values_only(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Engine and optimizer are made, and a checkpoint is loaded: weights must stand as the values say."""
        if state.is_hyper_param_search:
            raise InputError("a Trainer's hyperparameter search is not supported: make one Trainer for each trial")
        # Another model than at first, where the Trainer was given model_init.
        check_trainer(args, model, None, self.rounding)
        store_values_only(model)
        self.identity = _identity(model)
        self._check_continues(state, self.identity)
        self.engine = None
        if _distribution()[1] is not None:
            self.engine = compat.engine_of(model)
            if self.engine is None:
                raise RuntimeError("the Trainer's DeepSpeed engine was not found on its model: was the model wrapped?")
            _check_sequence_parallel(self.engine)
            attach(self.engine, rounding=self.rounding, rounding_seed=self.rounding_seed)
            compat.save_values_only(self.engine)
            # Also of an engine that has trained before, and has loaded a checkpoint since.
            write_values(self.engine)
        else:
            write_back(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """After a real step, not after the micro-batches before it."""
        if self.engine is None:
            write_back(model)

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """The Trainer has written a checkpoint: add the adapter to it. Collective."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_adapter(model if self.engine is None else self.engine, checkpoint / ADAPTER_FOLDER)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Training has ended, perhaps with the values of its best checkpoint. Collective."""
        if self.engine is None:
            write_back(model)
        else:
            write_values(self.engine)
        if args.save_strategy != "no":
            save_adapter(model if self.engine is None else self.engine, Path(args.output_dir) / ADAPTER_FOLDER)
