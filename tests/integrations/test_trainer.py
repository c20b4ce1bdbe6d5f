"""Does the Trainer alone, in this process, train, store, continue, hand over and refuse as it should?"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_zero as sz
from sparse_zero.checkpoint.folders import remove_folder
from sparse_zero.integrations.trainer import SparseZeroCallback, check_trainer
from sparse_zero.integrations.trainer_checkpoint import OtherBatchWarning, PassedOverWarning
from tests.integrations.test_two_ranks import FILES, check_random
from tests.integrations.workers import (
    DECAY,
    arguments,
    as_rows,
    best_run,
    collate_rows,
    losses_of,
    make_model,
    make_samples,
    make_selection,
    make_trainer,
    no_pickles,
    random_run,
    stored,
    weights_are_values,
)
from tests.models.tiny import tiny_llama


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**collate_rows(as_rows(make_samples()[:2]))).logits
    return logits


@pytest.mark.slow
def test_what_is_random_goes_on(tmp_path):
    check_random(random_run(tmp_path))


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
    changes: dict[str, Any] = {
        "max_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 8,
        "hub_token": "hf_secret",
    }
    trainer = make_trainer(tmp_path / "run", model, **changes)
    trainer.train()
    # A checkpoint is no model, and says so.
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(sz.InputError, match=r"without what was trained: sz\.save_adapter\(engine_or_model, folder\)"):
        model.save_pretrained(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    with no_pickles():
        trainer.save_model(str(tmp_path / "elsewhere"))
        trainer.save_model()
    assert stored(tmp_path / "elsewhere") == ["training_args.json"]
    assert (tmp_path / "run" / "checkpoint-2").is_dir(), "saving into the output folder leaves the rest of it"
    text = (tmp_path / "run" / "checkpoint-2" / "training_args.json").read_text()
    assert json.loads(text)["max_steps"] == 2
    assert "hf_secret" not in text

    trained = logits_of(model)
    again = tiny_llama(layers=2)
    sz.load_adapter(again, tmp_path / "elsewhere" / "adapter")
    torch.testing.assert_close(logits_of(again), trained, rtol=0, atol=1e-6)
    sz.merge(model)
    with no_pickles():
        trainer.save_model(str(tmp_path / "merged"))
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
    """After the first of two steps, with the callback, without, and with the callback but not for continuing."""
    from transformers import Trainer

    folder: Path = tmp_path_factory.mktemp("checkpoint")
    make_trainer(folder / "ours", make_model(), max_steps=1, save_steps=1).train()
    make_trainer(folder / "values", make_model(), max_steps=1, save_steps=1, save_only_model=True).train()

    def plain(steps: int) -> Any:
        return Trainer(
            make_model(),
            arguments(folder / "plain", max_steps=steps, save_steps=1),
            data_collator=collate_rows,
            train_dataset=as_rows(make_samples()),
        )

    plain(1).train()
    # The guard that all runs of ours are under sees what such a Trainer reads.
    with no_pickles(), pytest.raises(AssertionError, match="a pickle is written or read"):
        plain(2).train(resume_from_checkpoint=str(folder / "plain" / "checkpoint-1"))
    assert (folder / "plain" / "checkpoint-1" / "optimizer.pt").is_file(), "a Trainer without the callback is as it was"
    return folder


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        (another_base, "ours", "was trained on another base"),
        (another_selection, "ours", "has another selection"),
        (lambda: make_model("delta"), "ours", "placement 'inplace', the engine has 'delta', and weight decay"),
        (make_model, "plain", "was not written with SparseZeroCallback, and pickles are not read"),
        (make_model, "values", r"no state of the optimizer \(save_only_model\): start anew from sz.load_adapter"),
        (make_model, "nowhere", "no checkpoint folder .*nowhere"),
    ],
)
def test_a_foreign_checkpoint_is_refused(checkpoint, tmp_path, model, source, message):
    trainer = make_trainer(tmp_path, model(), max_steps=2, save_steps=1)
    with pytest.raises(sz.InputError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint / source / "checkpoint-1"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("groups", [], "does not have the state of this loop"),
        ("groups", [{"values": 5}], "does not have the state of this loop"),
        ("scheduler", None, "does not have the state of this loop"),
        ("scheduler", {"name": "LambdaLR", "state": {"$tuple": 1}}, r"\$tuple stands before something else"),
        ("samples_per_step", "eight", "does not have the state of this loop"),
    ],
)
def test_a_changed_checkpoint_is_refused_and_not_believed(checkpoint, tmp_path, monkeypatch, name, value, message):
    """As one would be that was made with manifest and hashes to fit."""

    def changed(folder: Path) -> Any:
        found = sz.read_checkpoint(folder)
        found.extra["trainer"][name] = value
        return found

    monkeypatch.setattr("sparse_zero.integrations.trainer_checkpoint.read_checkpoint", changed)
    trainer = make_trainer(tmp_path, make_model(), max_steps=2, save_strategy="no")
    with pytest.raises(sz.InputError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint / "ours" / "checkpoint-1"))


@pytest.mark.parametrize("change", [{"global_step": -1}, {"global_step": "1"}, {"__class__": "os.system"}])
def test_a_state_that_is_none_of_a_trainers_is_refused(checkpoint, tmp_path, change):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint / "ours" / "checkpoint-1", folder)
    state = folder / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | change))
    manifest = json.loads((folder / "manifest.json").read_text())
    data = state.read_bytes()
    manifest["files"][state.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(sz.InputError, match=r"trainer_state\.json is no state of a Trainer"):
        make_trainer(tmp_path, make_model(), max_steps=2).train(resume_from_checkpoint=str(folder))


def test_the_other_placement_continues_without_decay(tmp_path):
    changes: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "weight_decay": 0.0}
    trainer = make_trainer(tmp_path / "inplace", make_model(), **changes)
    trainer.train()
    other = make_trainer(tmp_path / "delta", make_model("delta"), **changes)
    other.train(resume_from_checkpoint=str(tmp_path / "inplace" / "checkpoint-1"))
    assert losses_of(other) == pytest.approx(losses_of(trainer), rel=1e-5)


def test_the_newest_good_checkpoint_is_found(tmp_path):
    changes: dict[str, Any] = {"max_steps": 3, "save_steps": 1, "restore_callback_states_from_checkpoint": True}
    trainer = make_trainer(tmp_path, make_model(), **changes)
    with pytest.raises(sz.InputError, match="name one, or start anew"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    masters = tmp_path / "checkpoint-3" / "masters.safetensors"
    masters.write_bytes(masters.read_bytes()[:-1])
    with pytest.raises(sz.InputError, match="cut off"):
        make_trainer(tmp_path, make_model(), **changes).train(resume_from_checkpoint=str(masters.parent))
    again = make_trainer(tmp_path, make_model(), **changes)
    with pytest.warns(
        PassedOverWarning, match=r"continuing from .*checkpoint-2; passed over: .*checkpoint-3.* cut off"
    ):
        again.train(resume_from_checkpoint=True)
    assert losses_of(again) == losses_of(trainer)
    for folder in tmp_path.glob("checkpoint-*"):
        (folder / "checkpoint.json").write_text("{")
    with pytest.raises(sz.InputError, match=r"checkpoint-3.*checkpoint\.json has 1 bytes instead of"):
        make_trainer(tmp_path, make_model(), **changes).train(resume_from_checkpoint=True)


def test_another_batch_size_is_said(checkpoint, tmp_path):
    trainer = make_trainer(tmp_path, make_model(), max_steps=2, save_strategy="no", gradient_accumulation_steps=2)
    with pytest.warns(OtherBatchWarning, match="has 8 samples, and now 4"):
        trainer.train(resume_from_checkpoint=str(checkpoint / "ours" / "checkpoint-1"))


def test_other_options_of_the_groups_are_continued_with(checkpoint, tmp_path):
    """As the Trainer does it: what the optimizer had, not what the arguments say now."""
    trainer = make_trainer(tmp_path, make_model(), max_steps=2, save_strategy="no", weight_decay=0.7)
    trainer.train(resume_from_checkpoint=str(checkpoint / "ours" / "checkpoint-1"))
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [DECAY, 0.0]
    other = make_trainer(
        tmp_path,
        make_model(),
        max_steps=2,
        save_strategy="no",
        eval_strategy="steps",
        lr_scheduler_type="reduce_lr_on_plateau",
    )
    with pytest.raises(sz.InputError, match="with the scheduler LambdaLR, and here is ReduceLROnPlateau"):
        other.train(resume_from_checkpoint=str(checkpoint / "ours" / "checkpoint-1"))


@pytest.mark.slow
def test_a_scheduler_that_knows_an_infinity_is_continued(tmp_path):
    changes: dict[str, Any] = {
        "max_steps": 2,
        "save_steps": 1,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
    }
    trainer = make_trainer(tmp_path, make_model(), **changes)
    trainer.train()
    with no_pickles():
        again = make_trainer(tmp_path, make_model(), **changes)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert losses_of(again) == losses_of(trainer)
    assert again.lr_scheduler.state_dict() == trainer.lr_scheduler.state_dict()


def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path):
    changes: dict[str, Any] = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1}
    make_trainer(tmp_path / "newest", make_model(), **changes).train()
    assert [path.name for path in (tmp_path / "newest").glob("checkpoint-*")] == ["checkpoint-3"]
    # The first one counts as the best; without the optimizer's state.
    best = best_run(tmp_path / "best", save_total_limit=2, save_only_model=True)
    assert best["values_are_best"]
    found = sorted(path.name for path in (tmp_path / "best").glob("checkpoint-*"))
    assert found == ["checkpoint-1", "checkpoint-3"]
    assert stored(tmp_path / "best" / "checkpoint-1") == ["manifest.json", "trainer_state.json", "training_args.json"]


def test_an_output_folder_of_another_program_is_refused_at_the_start(checkpoint, tmp_path):
    shutil.copytree(checkpoint / "plain", tmp_path / "plain")
    with pytest.raises(
        sz.InputError, match="checkpoint-1 was not written with SparseZeroCallback, and would be in the"
    ):
        make_trainer(tmp_path / "plain", make_model(), max_steps=1, save_steps=1).train()


def test_of_what_a_killed_trainer_leaves_nothing_is_lost(checkpoint, tmp_path):
    """In the middle of saving, of saving on a signal, and of copying: masters may be the only ones there are."""
    output = tmp_path / "output"
    for name in (".checkpoint-7.1.tmp", "checkpoint-1", "checkpoint-2", "checkpoint-8"):
        (output / name).mkdir(parents=True)
    masters = checkpoint / "ours" / "checkpoint-1" / "masters.safetensors"
    for name in ("checkpoint-1", "checkpoint-8"):
        shutil.copy(masters, output / name)
    (output / "checkpoint-2" / "checkpoint-is-incomplete.txt").touch()
    changes: dict[str, Any] = {"max_steps": 2, "save_steps": 1}
    with pytest.raises(sz.InputError, match=r"checkpoint-8 is no whole checkpoint, for it has no manifest\.json"):
        make_trainer(output, make_model(), **changes).train(resume_from_checkpoint=True)
    # Both saves keep the newest only; what is damaged does not count.
    make_trainer(output, make_model(), save_total_limit=1, **changes).train()
    damaged = ["checkpoint-8", "damaged-checkpoint-1.1"]
    assert sorted(path.name for path in output.iterdir()) == ["adapter", "checkpoint-2", *damaged]
    for name in damaged:
        assert (output / name / masters.name).read_bytes() == masters.read_bytes()
    assert stored(output / "checkpoint-2") == FILES
    again = make_trainer(output, make_model(), max_steps=3, save_strategy="no")
    with pytest.warns(
        PassedOverWarning, match=r"continuing from .*checkpoint-2; passed over: .*checkpoint-8 is no who"
    ):
        again.train(resume_from_checkpoint=True)


def test_a_checkpoint_that_cannot_be_removed_is_tried_again(tmp_path, monkeypatch):
    """One rank removes: were it to raise, the others would wait for it."""
    removed = []

    def refuse_once(folder: Path) -> None:
        removed.append(folder.name)
        if len(removed) == 1:
            raise PermissionError(13, "Permission denied", str(folder))
        remove_folder(folder)

    monkeypatch.setattr("sparse_zero.integrations.trainer_checkpoint.remove_folder", refuse_once)
    make_trainer(tmp_path, make_model(), max_steps=3, save_steps=1, save_total_limit=1).train()
    assert removed == ["checkpoint-1", "checkpoint-1", "checkpoint-2"]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_checkpoint_that_cannot_be_written_is_no_checkpoint(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, make_model(), max_steps=2, save_steps=1)

    def disk_is_full(*args: Any) -> None:
        if trainer.state.global_step == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparse_zero.integrations.trainer_checkpoint.write_arguments", disk_is_full)
    with pytest.raises(sz.InputError, match=r"checkpoint-2 cannot be written \(No space left on device\): make room"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_checkpoint_on_a_signal_is_whole(tmp_path):
    """The Trainer's handler of SIGTERM leaves a file where the checkpoint is to be."""
    from transformers.trainer_jit_checkpoint import CheckpointManager

    trainer = make_trainer(tmp_path, make_model(), max_steps=1, save_steps=2)
    trainer.train()
    CheckpointManager(trainer).execute_jit_checkpoint()
    assert stored(tmp_path / "checkpoint-1") == FILES


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
    for name, value, message in (
        ("save_on_each_node", True, "save_on_each_node is set"),
        ("push_to_hub", True, "hub_strategy is 'every_save': the Trainer would upload its arguments as a pickle"),
    ):
        with monkeypatch.context() as patch, pytest.raises(sz.InputError, match=message):
            patch.setattr(alone, name, value)
            check_trainer(alone, model, None)
    with pytest.raises(sz.InputError, match="hyperparameter search is not supported"):
        make_trainer(tmp_path, make_model()).train(trial={"learning_rate": 1.0})
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
    assert (again.rounding, again.rounding_seed) == ("stochastic", 3)
