"""Does a loop on accelerate, in this process and without DeepSpeed, store, continue and refuse as it should?"""

import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_zero as sz
from sparse_zero.integrations import accelerator as ours
from sparse_zero.integrations.accelerator import attach_accelerator
from tests.integrations.workers import (
    configure_accelerate,
    make_model,
    no_pickles,
    weights_are_values,
)
from tests.models.tiny import tiny_llama


class Registered:
    """An object with a state, as a data loader's position would be."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def prepared(model: Any = None, **options: Any) -> tuple[Any, Any, Any, Registered]:
    """An attached Accelerator, its optimizer and scheduler, and an object that is registered with it."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    configure_accelerate(deepspeed=False)
    project = ProjectConfiguration(**options) if options else None
    accelerator = Accelerator(cpu=True, project_config=project)
    model = make_model() if model is None else model
    optimizer: Any = torch.optim.SGD(sz.parameter_groups(model), lr=0.1)
    scheduler: Any = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3, 3], gamma=0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    registered = Registered()
    accelerator.register_for_checkpointing(registered)
    attach_accelerator(accelerator)
    return accelerator, optimizer, scheduler, registered


def step(accelerator: Any, optimizer: Any, scheduler: Any) -> None:
    for values in accelerator.unwrap_model(accelerator._models[0]).parameters():
        values.grad = torch.ones_like(values) if values.requires_grad else None
    optimizer.step()
    scheduler.step()
    accelerator.step += 1


def test_all_that_accelerate_keeps_comes_back(tmp_path):
    accelerator, optimizer, scheduler, registered = prepared()
    step(accelerator, optimizer, scheduler)
    # As fp16 would have it on a GPU.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    registered.state = {"position": (3, float("-inf")), "seen": Counter({7: 2}), "by rank": {0: [None, True]}}
    torch.manual_seed(5)
    with no_pickles():
        assert accelerator.save_state(str(tmp_path / "state")) == str(tmp_path / "state")
    drawn = torch.rand(3)
    again, optimizer_again, scheduler_again, registered_again = prepared()
    again.scaler = torch.amp.GradScaler("cpu")
    with no_pickles():
        again.load_state(str(tmp_path / "state"))
    assert torch.equal(torch.rand(3), drawn)
    assert registered_again.state == registered.state
    assert isinstance(registered_again.state["seen"], Counter)
    assert (again.step, optimizer_again.param_groups[0]["lr"]) == (1, 0.05)
    assert scheduler_again.state_dict() == scheduler.state_dict()
    assert again.scaler.state_dict() == accelerator.scaler.state_dict()
    model, loaded = (accelerator.unwrap_model(each._models[0]) for each in (accelerator, again))
    assert weights_are_values(loaded)
    for name, values in sz.trainable_parameters(model).items():
        assert torch.equal(values, sz.trainable_parameters(loaded)[name])
    # The next steps are those that would have been.
    for each in ((accelerator, optimizer, scheduler), (again, optimizer_again, scheduler_again)):
        step(*each)
        step(*each)
    assert optimizer_again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.0125


def test_automatic_names(tmp_path):
    accelerator, *_ = prepared(project_dir=str(tmp_path), automatic_checkpoint_naming=True, total_limit=2)
    for _ in range(3):
        accelerator.save_state()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint_1", "checkpoint_2"]
    accelerator.load_state()
    accelerator.project_configuration.iteration = 2
    message = r"checkpoint_2 exists: set accelerator\.project_configuration\.iteration to 3"
    with pytest.raises(sz.InputError, match=message):
        accelerator.save_state()


def test_automatic_names_go_on_after_a_restart(tmp_path):
    options = {"project_dir": str(tmp_path), "automatic_checkpoint_naming": True, "total_limit": 2}
    accelerator, *_ = prepared(**options)
    for _ in range(11):
        accelerator.save_state()

    def names() -> list[str]:
        return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    assert names() == ["checkpoint_10", "checkpoint_9"]
    again, *_ = prepared(**options)
    # As checkpoint_0 it would be the oldest, and removed at once.
    with pytest.raises(sz.InputError, match=r"checkpoint_10 exists: set .*iteration to 11"):
        again.save_state()
    assert names() == ["checkpoint_10", "checkpoint_9"]
    again.load_state()
    again.save_state()
    assert names() == ["checkpoint_10", "checkpoint_11"]
    # An older one that is named: the numbers go on from the newest, too.
    again.load_state(str(tmp_path / "checkpoints" / "checkpoint_10"))
    again.save_state()
    assert names() == ["checkpoint_11", "checkpoint_12"]


def test_a_checkpoint_that_cannot_be_removed_is_tried_again(tmp_path, monkeypatch):
    """One rank removes: were it to raise, the others would wait for it."""
    accelerator, *_ = prepared(project_dir=str(tmp_path), automatic_checkpoint_naming=True, total_limit=1)
    accelerator.save_state()

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(ours, "remove_folder", refuse)
        accelerator.save_state()
    assert (tmp_path / "checkpoints" / "checkpoint_0").is_dir()
    accelerator.save_state()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_2"]


def test_what_cannot_be_stored_or_loaded_is_refused(tmp_path, monkeypatch):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    accelerator, _, _, registered = prepared()
    registered.state = {"weights": torch.zeros(2)}
    with pytest.raises(sz.InputError, match="the state of the registered Registered has a Tensor, which could be"):
        accelerator.save_state(str(tmp_path / "state"))
    assert not (tmp_path / "state").exists()
    registered.state = {}
    with pytest.raises(sz.InputError, match="save_state has no output_dir"):
        accelerator.save_state()
    with pytest.raises(sz.InputError, match="load_state has no input_dir"):
        accelerator.load_state()
    accelerator.save_state(str(tmp_path / "state"))

    # accelerate's own, with pickles.
    Accelerator.save_state(accelerator, str(tmp_path / "pickled"))
    with pytest.raises(sz.InputError, match="pickled was not written by an Accelerator that is attached, and pickles"):
        accelerator.load_state(str(tmp_path / "pickled"))
    with pytest.raises(sz.InputError, match="no checkpoint folder"):
        accelerator.load_state(str(tmp_path / "nowhere"))
    accelerator.register_for_checkpointing(Registered())
    with pytest.raises(sz.InputError, match="state has 1 objects, and the Accelerator 2"):
        accelerator.load_state(str(tmp_path / "state"))
    handle = accelerator.register_save_state_pre_hook(lambda *_: None)
    with pytest.raises(sz.InputError, match="hooks are registered for save_state or load_state"):
        accelerator.save_state(str(tmp_path / "state"))
    handle.remove()

    with pytest.raises(sz.InputError, match="no trainable values"):
        prepared(tiny_llama(layers=2).requires_grad_(False))
    with pytest.raises(sz.InputError, match="has prepared 0 models and 0 optimizers"):
        attach_accelerator(Accelerator(cpu=True))
    with pytest.raises(sz.InputError, match="rounding is 'stochastic' without DeepSpeed"):
        attach_accelerator(accelerator, rounding="stochastic")
    with monkeypatch.context() as patch, pytest.raises(sz.InputError, match="spreads the model by FSDP"):
        patch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
        attach_accelerator(accelerator)
    with monkeypatch.context() as patch, pytest.raises(sz.InputError, match="has no Accelerator"):
        patch.delattr(accelerator, "_custom_objects")
        attach_accelerator(accelerator)


def test_a_checkpoint_of_another_loop_is_refused(tmp_path):
    accelerator, *_ = prepared()
    sz.save_checkpoint(_engine_of(accelerator), tmp_path / "other")
    with pytest.raises(sz.InputError, match="was not written by save_state: load it"):
        accelerator.load_state(str(tmp_path / "other"))


def _engine_of(accelerator: Any) -> Any:
    return accelerator.save_state.args[1]


def test_accelerate_is_as_it_was_read():
    """save_state writes DeepSpeed's files before any hook, and random states after all: hooks cannot stop it."""
    from accelerate import Accelerator, checkpointing

    source = inspect.getsource(Accelerator.save_state)
    assert source.index("model.save_checkpoint(output_dir") < source.index("in self._save_model_state_pre_hook"), (
        "hooks come first now: attach_accelerator could register one in place of replacing save_state"
    )
    assert "torch.save(states, output_states_file)" in inspect.getsource(checkpointing.save_accelerator_state)
    parameters = {"save_state": ("output_dir", "safe_serialization"), "load_state": ("input_dir", "load_kwargs")}
    for name, expected in parameters.items():
        assert set(expected) < set(inspect.signature(getattr(Accelerator, name)).parameters), f"{name} is called else"
    fields = Path(inspect.getfile(Accelerator)).read_text()
    for name in ours.PRIVATE:
        assert f"self.{name}" in fields, f"accelerate has no Accelerator.{name} any more"
