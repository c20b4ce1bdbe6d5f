"""What of transformers' Trainer has changed, where SparseZeroCallback fails with a new version of it?"""

import inspect
import re
from typing import Any

import pytest
import transformers.trainer
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler, ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import sparse_zero as sz
from sparse_zero.integrations import trainer_compat
from sparse_zero.integrations.trainer import SparseZeroCallback


def source(name: str) -> str:
    """Of the Trainer's own method, whether it has been wrapped or not."""
    return inspect.getsource(inspect.unwrap(getattr(Trainer, name)))


def test_methods_are_there():
    for name, parameters in trainer_compat.METHODS.items():
        assert tuple(inspect.signature(getattr(Trainer, name)).parameters) == parameters, f"Trainer.{name}"
    trainer_compat.check_version()


def test_a_trainer_with_other_methods_is_refused(monkeypatch):
    class Other(Trainer):
        def _save_checkpoint(self, model: Any, trial: Any, metrics: Any = None) -> None:
            """As it was in transformers 4."""

    monkeypatch.setattr(transformers.trainer, "Trainer", Other)
    with pytest.raises(
        sz.InputError, match=re.escape("has no Trainer._save_checkpoint(self, model, trial) as 5.23.0 has")
    ):
        SparseZeroCallback()


def test_pickles_are_where_they_were_read():
    """Every method of the Trainer that pickles is called by one that is wrapped, or refused, and by no other."""
    writes = {name for name, method in vars(Trainer).items() if callable(method) and pickles(method)}
    reached = {
        "_save": {"save_model"},
        "_save_optimizer_and_scheduler": {"_save_checkpoint"},
        "_save_scaler": {"_save_checkpoint"},
        "_save_rng_state": {"_save_checkpoint"},
        "_load_optimizer_and_scheduler": {"_prepare_for_training"},
        "_load_scaler": {"_prepare_for_training"},
        # Only with hub_strategy "end", which returns before; check_trainer refuses the others.
        "_push_from_checkpoint": {"_save_checkpoint"},
    }
    # In the search for hyperparameters only, which is refused.
    searches = {"_tune_save_checkpoint"}
    assert writes == {*reached, *searches, "_load_from_checkpoint", "_load_best_model", "_load_rng_state"}
    for name, callers in reached.items():
        found = {
            other
            for other, method in vars(Trainer).items()
            if inspect.isfunction(method) and re.search(rf"self\.{name}\(", inspect.getsource(inspect.unwrap(method)))
        }
        assert found == callers <= set(trainer_compat.METHODS), f"Trainer.{name} is called by {found}"


def pickles(method: Any) -> bool:
    method = inspect.unwrap(method)
    return inspect.isfunction(method) and bool(re.search(r"\b(torch|smp|xm)\.(save|load)\(", inspect.getsource(method)))


def test_what_the_wrapped_methods_rely_on():
    prepare = source("_prepare_for_training")
    _, loads, after = re.split(
        r"\):\n.*?(?=        if resume_from|\Z)|(?=        # Update the ref)", prepare, flags=re.S
    )[:3]
    assert "resume_from_checkpoint" not in after, "it does more with what it is told to continue from than load it"
    assert loads.startswith("        if resume_from_checkpoint is not None:\n"), loads
    inner = source("_inner_training_loop")
    assert inner.index("self._init_training_state(") < inner.index("self._prepare_for_training(")
    assert inner.index("self._prepare_for_training(") < inner.index("callback_handler.on_train_begin(")
    assert "self._load_rng_state(resume_from_checkpoint)" in source("_run_epoch")
    assert "self._load_best_model()" in source("_finalize_training")
    assert "self._save_checkpoint(model, trial)" in source("_maybe_log_save_evaluate")


def test_names_that_are_used():
    assert PREFIX_CHECKPOINT_DIR == "checkpoint"
    state = TrainerState()
    for name in ("global_step", "best_global_step", "best_model_checkpoint", "stateful_callbacks", "save_to_json"):
        assert hasattr(state, name), f"TrainerState.{name}"
    assert hasattr(ExportableState, "state")
    assert "self.callbacks" in inspect.getsource(CallbackHandler.__init__)
    made = source("__init__")
    for name in ("callback_handler", "processing_class", "data_collator", "control", "accelerator", "lr_scheduler"):
        assert re.search(rf"self\.{name}\b", made), f"Trainer.{name}"


def test_wrapping_twice_does_nothing():
    SparseZeroCallback()
    method = Trainer._save_checkpoint
    SparseZeroCallback()
    assert Trainer._save_checkpoint is method
