"""A run that has run out of memory: it ends on all ranks, and says where, why, and what would fit."""

import functools
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.config import RunConfig, load_config
from launcher.memory.measuring import RunMemory
from launcher.memory.memory_config import MemoryConfig
from launcher.memory.out_of_memory import Failure, asked_bytes, describe, explain, find_out_of_memory, module_at_work
from launcher.memory.room import Room, held_bytes, room_of
from launcher.plan.forecasting import Shapes, forecast_run, planned_selection, shapes_of
from launcher.plan.search import bytes_needed, changes_that_fit, fits, largest_that_fits
from launcher.starting.control_groups import group_limit, oom_counter, oom_kills
from launcher.starting.node_guard import Watch
from scripts import tiny_run as tiny
from sparse_zero.selection.selection import Selection
from tests.launcher.memory_worker import be_a_limited_rank

MIB = 2**20
SETTINGS = tiny.RunSettings(steps=40, every=100, hidden=192)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    tiny.write_base(folder / "base", SETTINGS)
    kind = tiny.Kind(stage=2, placement="inplace", reselects=False, reports=False)
    return tiny.write_config(folder / "base", folder, kind, SETTINGS)


@pytest.fixture(scope="module")
def planned(config_file: Path) -> tuple[RunConfig, Shapes, Selection]:
    overrides = ["training.micro_batch_size=8", "training.global_batch_size=16", "data.batching=pad",
                 "data.max_length=512"]  # fmt: skip
    config = load_config(config_file, overrides)
    shapes = shapes_of(config)
    return config, shapes, planned_selection(config, shapes)


# --- for real ------------------------------------------------------------------------------------------------


def ended(started: tiny.Start) -> list[int | None]:
    deadline = time.monotonic() + 240
    while None in started.codes() and time.monotonic() < deadline:
        time.sleep(0.02)
    started.kill([rank for rank, code in enumerate(started.codes()) if code is None])
    return started.codes()


def test_a_rank_that_the_kernel_refuses_memory_ends_all_and_says_what_would_fit(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "be_a_rank", functools.partial(be_a_limited_rank, rank=1, step=2))
    options = (f"--output.folder={tmp_path / 'run'}", "--training.micro_batch_size=4", "--training.global_batch_size=8")
    started = tiny.Start(config_file, tmp_path, *options, "--data.batching=pad")
    began = time.monotonic()
    assert ended(started) == [75, 1], started.output()
    assert time.monotonic() - began < 120
    said = started.logs[1].read_text()
    assert "sparse-zero: error: rank 1 ran out of memory in backward (model." in said, said
    assert "more were asked for" in said
    # By kind, as it was when it failed, and of the forecast what is largest.
    assert "held in tensors: " in said
    assert "activations" in said
    assert "of address space (ulimit -v)" in said
    assert "forecast of backward: " in said
    assert said.count("would fit: --") == 2
    assert "--training.gradient_checkpointing=true" in said or "--training.micro_batch_size=" in said
    assert "Traceback" not in said
    assert "would fit" not in started.logs[0].read_text()


@pytest.mark.slow
def test_a_rank_that_was_killed_otherwise_is_not_said_to_have_had_too_little_memory(
    config_file: Path, tmp_path: Path
) -> None:
    started = tiny.Start(config_file, tmp_path, f"--output.folder={tmp_path / 'run'}", "--training.steps=2000")
    deadline = time.monotonic() + 240
    while not (started.trains and tiny.steps_done(tmp_path / "run") > 1):
        assert started.codes() == [None, None], started.output()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.send(signal.SIGKILL, [1])
    assert ended(started) == [75, -9], started.output()
    said = started.logs[0].read_text()
    assert "rank 0 has lost the connection to another rank" in said
    assert "memory" not in said.partition("lost the connection")[2]


# --- what the kernel tells -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "file", "text"),
    [
        ("0::/job/1\n", "job/1/memory.events", "low 0\nhigh 0\nmax 7\noom 2\noom_kill {}\noom_group_kill 0\n"),
        ("4:memory,cpu:/job/1\n0::/\n", "memory/job/1/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"),
        ("4:memory:/outside/of/a/container\n", "memory/memory.oom_control", "oom_kill_disable 0\noom_kill {}\n"),
    ],
)  # fmt: skip
def test_the_control_group_of_a_rank_counts_its_kills(tmp_path: Path, groups: str, file: str, text: str) -> None:
    proc, tree = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "77").mkdir(parents=True)
    (proc / "77" / "cgroup").write_text(groups)
    (proc / "vmstat").write_text("pgfault 3\noom_kill 9\n")
    counter = tree / file
    counter.parent.mkdir(parents=True)
    counter.write_text(text.format(4))
    assert oom_counter(77, proc, tree) == counter
    assert oom_kills(counter) == 4
    counter.unlink()
    # The whole machine's, where groups are silent.
    assert oom_counter(77, proc, tree) == proc / "vmstat"
    assert oom_kills(proc / "vmstat") == 9
    assert oom_kills(tmp_path / "absent") == 0


def test_the_guard_of_a_node_tells_of_kills_since_a_rank_began(tmp_path: Path) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text("oom_kill 4\n")
    watch = Watch(tmp_path)
    watch._oom_kills[0] = (counter, oom_kills(counter))
    assert watch.look()["oom_kills"] == 0
    counter.write_text("oom_kill 5\n")
    assert watch.look()["oom_kills"] == 1


# --- what is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 20971520 bytes. Error code 12", 20 * MIB),
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.68 GiB", 2560 * MIB),
        ("std::bad_alloc", None),
    ],
)
def test_what_was_asked_for_stands_in_the_message(text: str, expected: int | None) -> None:
    assert asked_bytes(RuntimeError(text)) == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_an_allocation_that_failed_is_found_below_other_errors(error: Exception) -> None:
    outside = ValueError("outside")
    outside.__cause__ = error
    assert find_out_of_memory(outside) is error
    assert find_out_of_memory(RuntimeError("a shape does not fit")) is None


class Refusing(torch.nn.Module):
    """Has no memory for its forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise MemoryError


def test_the_module_is_found_where_nothing_was_measured() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(Refusing()))
    with pytest.raises(MemoryError) as caught:
        model(torch.zeros(1, 2))
    assert module_at_work(caught.value) == "1.0"
    with pytest.raises(MemoryError) as caught:
        raise MemoryError
    assert module_at_work(caught.value) == ""


def test_a_run_is_explained_before_anything_was_measured(planned: tuple[RunConfig, Shapes, Selection]) -> None:
    config, _, selection = planned
    memory = RunMemory(MemoryConfig(), torch.device("cpu"))
    memory.selection = selection
    with pytest.raises(MemoryError) as caught, memory.phase("calibration"):
        raise MemoryError
    lines = explain(caught.value, config, 3, 4, memory)
    memory.peaks.close()
    assert lines[0] == "rank 3 ran out of memory in calibration"
    assert lines[1].startswith("there was: ")
    assert lines[2].startswith("forecast of ")
    assert lines[3].startswith("would fit: --")


def test_where_nothing_would_fit_it_is_said(planned: tuple[RunConfig, Shapes, Selection]) -> None:
    config, shapes, selection = planned
    forecast = forecast_run(config, 1, shapes=shapes, selection=selection)
    room = Room(num_bytes=10 * MIB, what="of the GPU", overhead_bytes=9 * MIB)
    lines = describe(0, Failure(phase="load"), room, forecast, "", [])
    assert "use more ranks, or more memory" in lines[-1]
    lines = describe(0, Failure(phase="step"), room, None, "no closed form", [])
    assert lines[-1] == "forecast: none (no closed form)"


def test_the_room_of_a_rank_is_its_tightest_limit() -> None:
    held = held_bytes()
    assert held["address_space"] > held["resident"] > 10 * MIB
    alone, shared = (room_of(torch.device("cpu"), ranks, held) for ranks in (1, 2))
    assert shared.num_bytes == alone.num_bytes // 2
    assert 0 < alone.for_tensors == alone.num_bytes - held["resident"]


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        # Nothing said, or no limit.
        ("0::/", {}, 0),
        ("0::/", {"memory.max": "max"}, 0),
        ("4:memory:/", {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, 0),
        # A container sees its own group as the root, whatever its path on the host.
        ("0::/docker/1234", {"memory.max": "5000"}, 5000),
        # Slurm limits the job, and the process is in a group of its step's task.
        (
            "0::/job_7/step_0/task_0",
            {"memory.max": "max", "job_7/memory.max": "300", "job_7/step_0/memory.max": "max"},
            300,
        ),
        ("0::/job_7/step_0", {"job_7/memory.max": "300", "job_7/step_0/memory.max": "200"}, 200),
        ("3:cpu,memory:/job_7/step_0", {"memory/job_7/memory.limit_in_bytes": "300"}, 300),
        # Another one's group does not count.
        ("0::/job_7", {"job_8/memory.max": "100", "job_7/memory.max": "300"}, 300),
    ],
)
def test_the_tightest_limit_of_all_groups_above_counts(
    own: str, limits: dict[str, str], expected: int, tmp_path: Path
) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(own + "\n")
    for name, text in limits.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert group_limit(tmp_path / "proc", tmp_path / "groups") == expected


# --- what would fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.9, 0.7, 0.45, 0.3])
def test_changes_are_real_ones_and_the_cheapest_come_first(
    planned: tuple[RunConfig, Shapes, Selection], share: float
) -> None:
    config, shapes, selection = planned
    before = forecast_run(config, 2, shapes=shapes, selection=selection)
    room = share * before.peak_bytes
    assert not fits(before, room)
    changes = changes_that_fit(config, 2, room, shapes, selection)
    assert changes
    mapping: dict[str, Any] = {}
    for change in changes:
        assert bytes_needed(change.forecast) <= room
        assert change.config != config
        assert change.slowdown >= 1.0
        if change.changes_result or any("data." in each for each in change.overrides):
            assert not change.can_continue
        mapping[" ".join(change.overrides)] = change
    # None has what another one does without.
    sets = [set(change.overrides) for change in changes]
    assert not any(one < other for one in sets for other in sets)
    assert len(mapping) == len(changes)
    if share == 0.9:
        assert not changes[0].changes_result
    # With room for all, overhead can still be too much.
    assert not fits(before, before.peak_bytes, overhead_bytes=1)


def test_an_override_means_what_was_forecast(config_file: Path, planned: tuple[RunConfig, Shapes, Selection]) -> None:
    config, shapes, selection = planned
    before = forecast_run(config, 2, shapes=shapes, selection=selection).peak_bytes
    (change, *_) = changes_that_fit(config, 2, 0.7 * before, shapes, selection)
    given = ["training.micro_batch_size=8", "training.global_batch_size=16", "data.batching=pad", "data.max_length=512"]
    assert load_config(config_file, [*given, *change.overrides]) == change.config


def test_a_micro_batch_that_was_measured_is_made_smaller_with_the_run(
    planned: tuple[RunConfig, Shapes, Selection],
) -> None:
    config, shapes, selection = planned
    measured: dict[str, Any] = {"micro_batch": 8, "length": 100, "label_positions": 60}
    before = forecast_run(config, 1, shapes=shapes, selection=selection, **measured)
    changes = changes_that_fit(
        config, 1, 0.75 * before.peak_bytes, shapes, selection, most=8, filled_fraction=0.5, **measured
    )
    named = {change.overrides: change for change in changes}
    # Cutting samples at 256 leaves these of 100 tokens as they are: alone it is no help.
    assert ("--data.max_length=256",) not in named
    assert any("--training.micro_batch_size=" in " ".join(names) or "--data.batching=pack" in names for names in named)


def test_the_largest_that_fits_is_found_by_bisection() -> None:
    asked: list[int] = []

    def fits_with(value: int) -> bool:
        asked.append(value)
        return value <= 777

    assert largest_that_fits(1, 4096, fits_with) == 777
    assert len(asked) <= 14
    assert largest_that_fits(1, 5, lambda value: True) == 5
    assert largest_that_fits(3, 5, lambda value: False) is None
