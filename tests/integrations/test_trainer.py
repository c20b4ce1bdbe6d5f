"""Does the Trainer alone, in this process, train, store, continue, hand over and refuse as it should?"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import sparse_zero as sz
from sparse_zero.integrations.stored_values import ValuesOnlyWarning
from sparse_zero.integrations.trainer import SparseZeroCallback, check_trainer
from tests.integrations.workers import (
    arguments,
    as_rows,
    best_run,
    collate_rows,
    make_model,
    make_samples,
    make_selection,
    make_trainer,
    trainer_run,
    weights_are_values,
)
from tests.models.tiny import tiny_llama


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**collate_rows(as_rows(make_samples()[:2]))).logits
    return logits


def test_one_process_without_deepspeed(runs, tmp_path):
    run = trainer_run(tmp_path, "inplace")
    assert run["losses"] == pytest.approx(runs["own"]["inplace"], rel=1e-5)
    assert run["resumed_losses"] == pytest.approx(run["losses"], rel=1e-6)
    assert run["written_back"]
    assert run["adapter_difference"] == 0.0


def test_the_best_checkpoint_is_loaded(tmp_path):
    best = best_run(tmp_path)
    assert best == {
        "best_is_first": True,
        "values_are_best": True,
        "values_had_moved_on": True,
        "written_back": True,
    }


def test_what_a_sparse_model_saves_and_what_a_merged_one(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model("delta")
    trainer = make_trainer(tmp_path / "run", model, max_steps=2, save_steps=2, per_device_train_batch_size=8)
    trainer.train()
    # A checkpoint is no model, and says so; so does what is saved elsewhere before merging.
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    with pytest.warns(ValuesOnlyWarning, match=r"sz\.save_adapter\(engine_or_model, folder\) writes an adapter"):
        trainer.save_model(str(tmp_path / "elsewhere"))
    with safe_open(tmp_path / "elsewhere" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(sz.trainable_parameters(model))
    assert not (tmp_path / "elsewhere" / "config.json").exists()
    assert set(model.state_dict()) == set(sz.trainable_parameters(model))

    trained = logits_of(model)
    sz.merge(model)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert set(model.state_dict()) == set(tiny_llama(layers=2).state_dict()) == set(merged.state_dict())
    torch.testing.assert_close(logits_of(merged), trained, rtol=1e-5, atol=1e-5)


def another_base() -> Any:
    base = tiny_llama(layers=2, seed=1)
    sz.sparsify(base, make_selection())
    return base


def another_selection() -> Any:
    """As many values of each name, but of other blocks."""
    weights = dict(make_selection().weights)
    name = next(name for name, chosen in weights.items() if len(chosen.columns))
    chosen = weights[name]
    weights[name] = sz.WeightSelection(
        shape=chosen.shape,
        block_size=24 if len(chosen.blocks) else 0,
        blocks=chosen.blocks,
        rows=chosen.rows,
        columns=[int(column) + 1 for column in chosen.columns],
    )
    model = tiny_llama(layers=2)
    sz.sparsify(model, sz.Selection(weights))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """After the first of two steps, with the callback and without."""
    from transformers import Trainer

    folder: Path = tmp_path_factory.mktemp("checkpoint")
    make_trainer(folder / "ours", make_model(), max_steps=1, save_steps=1).train()
    plain = Trainer(
        make_model(),
        arguments(folder / "plain", max_steps=1, save_steps=1),
        data_collator=collate_rows,
        train_dataset=as_rows(make_samples()),
    )
    plain.train()
    return folder


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        (another_base, "ours", "has another base"),
        (another_selection, "ours", "has another selection"),
        (lambda: make_model("delta"), "ours", r"has another placement \(inplace\) than the model \(delta\)"),
        (make_model, "plain", "was not written with SparseZeroCallback"),
    ],
)
def test_a_foreign_checkpoint_is_refused(checkpoint, tmp_path, model, source, message):
    trainer = make_trainer(tmp_path, model(), max_steps=2, save_steps=1)
    with pytest.raises(sz.InputError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint / source / "checkpoint-1"))


def test_write_back_waits_for_the_whole_batch(tmp_path):
    """Between micro-batches the weights hold the values of the step before."""
    from transformers import TrainerCallback

    seen = []

    class Watch(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
            seen.append(("substep", weights_are_values(model)))

        def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
            seen.append(("step", weights_are_values(model)))

    trainer = make_trainer(tmp_path, make_model(), max_steps=2, save_strategy="no")
    trainer.add_callback(Watch())
    trainer.train()
    assert seen == [("substep", True)] * 3 + [("step", True)] + [("substep", True)] * 3 + [("step", True)]
    assert not (tmp_path / "adapter").exists(), "save_strategy 'no' stores nothing"


def head_model() -> Any:
    model = tiny_llama(layers=2)
    shape = tuple(model.lm_head.weight.shape)
    rows = sz.WeightSelection(shape=shape, rows=[1, 2])
    sz.sparsify(model, sz.Selection({"lm_head.weight": rows}))
    return model


def accelerated(folder: Path, kind: Any = None, **changes: Any) -> Any:
    """Arguments, and the Accelerator that a Trainer would make from them."""
    from accelerate import Accelerator

    found = arguments(folder, kind, **changes)
    Accelerator(cpu=True)
    return found


def test_what_cannot_work_is_refused_when_the_trainer_is_made(tmp_path, monkeypatch):
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    with pytest.raises(sz.InputError, match="no trainable values: call sparsify first"):
        make_trainer(tmp_path, tiny_llama(layers=2))
    model = make_model()
    optimizer = torch.optim.AdamW(sz.parameter_groups(model), lr=1e-3)
    alone = accelerated(tmp_path)
    check_trainer(alone, model, optimizer)
    with pytest.raises(sz.InputError, match="rounding is 'stochastic' without DeepSpeed"):
        check_trainer(alone, model, None, "stochastic")
    # What neither this machine nor a test on CPUs has: two GPUs in one process, and FSDP.
    with monkeypatch.context() as patch, pytest.raises(sz.InputError, match="copy the model to 2 GPUs in every step"):
        patch.setattr(alone, "_n_gpu", 2)
        check_trainer(alone, model, None)
    with monkeypatch.context() as patch, pytest.raises(sz.InputError, match="spreads the model by FSDP"):
        patch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
        check_trainer(alone, model, None)
    alone.use_liger_kernel = True
    check_trainer(alone, model, None)
    with pytest.raises(sz.InputError, match="the output head has values, and use_liger_kernel computes the loss"):
        check_trainer(alone, head_model(), None)


def test_trl_with_values_in_the_head_is_refused(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'sparse-zero[trl]'")
    found = accelerated(tmp_path, trl.SFTConfig, bf16=False, activation_checkpointing=False)
    check_trainer(found, make_model(), None)
    with pytest.raises(sz.InputError, match=r"the output head has values, and TRL computes .* leave the head"):
        check_trainer(found, head_model(), None)


def test_the_callback_travels_in_the_trainers_state():
    from transformers import TrainerCallback

    callback = SparseZeroCallback(rounding="stochastic", rounding_seed=3)
    assert isinstance(callback, TrainerCallback)
    again = type(callback).from_state(callback.state())
    assert isinstance(again, SparseZeroCallback)
    assert (again.rounding, again.rounding_seed, again.identity) == ("stochastic", 3, {})
