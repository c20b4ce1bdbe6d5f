"""Is a run folder kept from being mixed up, pruned too far, or started from the wrong checkpoint?"""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config import RunConfig, apply_override, parse_config, resolved_yaml
from launcher.resuming import find_start
from launcher.run_folder import FREE_KEYS, RunFolder, RunLock, check_out_file, check_same_run, check_writable
from sparse_zero.checkpoint.folders import MANIFEST
from sparse_zero.errors import InputError


def make(folder: Path, *overrides: str) -> RunConfig:
    mapping: dict[str, Any] = {
        "model": {"name_or_path": "m"},
        "data": {"train": "d.json", "validation": "v.json"},
        "selection": {"regions": [{"kind": "row", "modules": ["*"], "per_matrix": 1}]},
        "training": {"steps": 9},
        "zero": {},
        "output": {"folder": str(folder)},
    }
    for override in overrides:
        apply_override(mapping, override)
    return parse_config(mapping)


def add_checkpoints(folder: Path, *steps: int, complete: bool = True) -> RunFolder:
    run_folder = RunFolder(folder)
    for step in steps:
        checkpoint = run_folder.checkpoint(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / (MANIFEST if complete else "masters.safetensors")).write_text("{}")
    return run_folder


def steps_in(folder: RunFolder) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.checkpoints.glob("step-*"))


# --- pruning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "written", "keep", "left"),
    [
        ([100, 200, 300], 300, 2, [200, 300]),
        ([100, 200, 300], 300, 5, [100, 200, 300]),
        ([100, 200, 300], 300, 1, [300]),
        # A start from an older checkpoint: what is newer stays, and so does what was just written.
        ([50, 100, 150, 200, 300], 150, 1, [150, 200, 300]),
        ([50, 100, 150, 200, 300], 150, 2, [100, 150, 200, 300]),
        ([9, 999_999, 1_000_000], 1_000_000, 2, [999_999, 1_000_000]),
    ],
)
def test_pruning_spares_the_written_checkpoint_and_all_newer(
    tmp_path: Path, present: list[int], written: int, keep: int, left: list[int]
) -> None:
    folder = add_checkpoints(tmp_path, *present)
    folder.mark_latest(folder.checkpoint(written), keep)
    assert steps_in(folder) == left
    assert (folder.checkpoints / "latest").read_text() == f"step-{written:06d}\n"


def test_pruning_counts_complete_checkpoints_only(tmp_path: Path) -> None:
    add_checkpoints(tmp_path, 1, 3)
    folder = add_checkpoints(tmp_path, 2, complete=False)
    folder.mark_latest(folder.checkpoint(3), 2)
    assert steps_in(folder) == [1, 2, 3]


# --- where a start continues -------------------------------------------------------------------------------


def test_auto_continues_from_the_newest_complete_one(tmp_path: Path) -> None:
    assert find_start(RunFolder(tmp_path), make(tmp_path)) is None
    folder = add_checkpoints(tmp_path, 2, 10)
    add_checkpoints(tmp_path, 11, complete=False)
    assert find_start(folder, make(tmp_path)) == folder.checkpoint(10)


def test_never_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    never = make(tmp_path, "checkpoint.resume=never")
    assert find_start(RunFolder(tmp_path), never) is None
    with pytest.raises(InputError, match=r"checkpoint\.resume is 'never'"):
        find_start(add_checkpoints(tmp_path, 1), never)


def test_a_path_elsewhere_is_where_a_new_run_starts_and_no_more(tmp_path: Path) -> None:
    other = add_checkpoints(tmp_path / "other", 4, 8).checkpoint(4)
    mine = RunFolder(tmp_path / "mine")
    config = make(mine.path, f"checkpoint.resume={other}")
    assert find_start(mine, config) == other
    # Interrupted and started again by the same command: it goes on where it was.
    add_checkpoints(mine.path, 6)
    assert find_start(mine, config) == mine.checkpoint(6)


def test_a_path_in_this_folder_is_the_newest_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = add_checkpoints(tmp_path / "run", 2, 4)
    add_checkpoints(tmp_path / "run", 5, complete=False)
    newest, older = (make(folder.path, f"checkpoint.resume={folder.checkpoint(step)}") for step in (4, 2))
    assert find_start(folder, newest) == folder.checkpoint(4)
    with pytest.raises(InputError, match=r"went on after it \(.*step-000004\): name another output.folder, or delete"):
        find_start(folder, older)
    # The same folder by another name.
    monkeypatch.chdir(tmp_path)
    relative = make(folder.path, "checkpoint.resume=run/../run/checkpoints/step-000002")
    with pytest.raises(InputError, match="step-000004"):
        find_start(RunFolder("run"), relative)
    folder.summary.write_text("{}")
    with pytest.raises(InputError, match=r"went on after it \(.*summary.json\)"):
        find_start(folder, newest)


@pytest.mark.parametrize("name", ["step-000005", "step-000007", "latest"])
def test_a_path_without_a_complete_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    folder = add_checkpoints(tmp_path, 2)
    add_checkpoints(tmp_path, 5, complete=False)
    with pytest.raises(InputError, match="no complete checkpoint there"):
        find_start(folder, make(tmp_path, f"checkpoint.resume={folder.checkpoints / name}"))


# --- which run it is ---------------------------------------------------------------------------------------


def started(tmp_path: Path) -> RunFolder:
    folder = add_checkpoints(tmp_path, 1)
    folder.config.write_text(resolved_yaml(make(tmp_path)))
    return folder


FREE = [
    "checkpoint.every=3",
    "output.merged=true",
    "cluster.ranks_per_node=5",
    "batch.slurm.partition=gpu",
    "memory.measure=false",
    "training.micro_batch_size=1",
    "training.gradient_checkpointing=true",
    "training.loss_chunk=64",
    "training.kernels=liger",
    "training.region_kernels=auto",
    "training.max_nonfinite_steps=3",
    "training.validation_every=2",
    "training.prefix_cache={max_gib: 2}",
    "data.validation=w.json",
    "data.validation_split=dev",
    "zero.stage=1",
    "zero.options={overlap_comm: true}",
    "zero.config={steps_per_print: 5}",
    "zero.placement=delta",
    "zero.offload_optimizer=cpu",
    "zero.offload_base=none",
    "zero.nvme_path=disk",
]


def test_a_run_of_an_earlier_version_had_the_defaults_of_younger_settings(tmp_path: Path) -> None:
    folder = started(tmp_path)
    older = yaml.safe_load(folder.config.read_text())
    for section, setting in (("training", "optimizer"), ("training", "per_kind"), ("model", "quantization")):
        del older[section][setting]
    folder.config.write_text(yaml.safe_dump(older))
    check_same_run(folder, make(tmp_path))
    with pytest.raises(InputError, match=r"training\.optimizer was 'adamw' and is now 'lion'"):
        check_same_run(folder, make(tmp_path, "training.optimizer=lion"))


def test_every_free_key_is_tried() -> None:
    assert all(any(override.startswith(key) for override in FREE) for key in FREE_KEYS)
    assert len(FREE) == len(FREE_KEYS)


@pytest.mark.parametrize("override", FREE)
def test_what_does_not_change_what_is_learned_may_differ(tmp_path: Path, override: str) -> None:
    check_same_run(started(tmp_path), make(tmp_path, override))


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("training.learning_rate=0.5", "training.learning_rate was 0.0001 and is now 0.5"),
        ("training.global_batch_size=8", "training.global_batch_size was 16 and is now 8"),
        ("training.precision=bf16", "training.precision was 'fp32' and is now 'bf16'"),
        ("data.train=e.json", "data.train was 'd.json' and is now 'e.json'"),
        ("data.max_length=9", "data.max_length was 512 and is now 9"),
        ("model.name_or_path=n", "model.name_or_path was 'm' and is now 'n'"),
        ("selection.seed=3", "selection.seed was 0 and is now 3"),
    ],
)
def test_what_changes_what_is_learned_is_refused_by_name(tmp_path: Path, override: str, difference: str) -> None:
    folder, config = started(tmp_path), make(tmp_path, override)
    with pytest.raises(InputError, match="holds another run") as error:
        check_same_run(folder, config)
    assert difference in str(error.value)


def test_a_folder_in_which_nothing_was_trained_may_be_taken_over(tmp_path: Path) -> None:
    folder, other = RunFolder(tmp_path), make(tmp_path, "training.learning_rate=0.5")
    folder.config.write_text(resolved_yaml(make(tmp_path)))
    check_same_run(folder, other)
    folder.summary.write_text("{}")
    with pytest.raises(InputError, match="holds another run"):
        check_same_run(folder, other)


@pytest.mark.parametrize("content", ["", "- a\n", "training: {steps: [1\n", "just words\n", b"\xff\xfe"])
def test_a_damaged_config_is_named(tmp_path: Path, content: str | bytes) -> None:
    folder = started(tmp_path)
    folder.config.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"config\.yaml.*restore it, or name another folder") as error:
        check_same_run(folder, make(tmp_path))
    assert "\n" not in str(error.value)


def test_a_cut_off_config_is_another_run(tmp_path: Path) -> None:
    folder = started(tmp_path)
    text = folder.config.read_text()
    folder.config.write_text(text[: text.index("selection:")])
    with pytest.raises(InputError, match="holds another run \\(selection was None"):
        check_same_run(folder, make(tmp_path))
    folder.config.write_text("training: 3\n")
    with pytest.raises(InputError, match="holds another run \\(training was 3"):
        check_same_run(folder, make(tmp_path))


# --- where files can be written ----------------------------------------------------------------------------


def test_writable(tmp_path: Path) -> None:
    check_writable(RunFolder(tmp_path))
    check_writable(RunFolder(tmp_path / "new" / "deeper"))
    check_out_file(tmp_path / "new" / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_file_or_folder_in_the_way_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for folder in (file, file / "below" / "it"):
        with pytest.raises(InputError, match=f"^output.folder is {folder}, but {file} is a file"):
            check_writable(RunFolder(folder))
    check_out_file(file)
    with pytest.raises(InputError, match=f"^--out is {tmp_path}, which is a folder"):
        check_out_file(tmp_path)
    with pytest.raises(InputError, match=f"^--out is {file}/x, but {file} is a file"):
        check_out_file(file / "x")


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The permission is denied by hand: tests may run as a user who may do everything."""

    def access(path: Path, mode: int) -> bool:
        assert mode == os.W_OK | os.X_OK
        return Path(path) != tmp_path

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(InputError, match=f"but {tmp_path} is not writable"):
        check_writable(RunFolder(tmp_path / "new" / "run"))
    (tmp_path / "own").mkdir()
    check_writable(RunFolder(tmp_path / "own" / "run"))


def test_a_run_folder_is_used_by_one_start_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunLock(folder) as first:
        first.take()  # Not there yet, and not made.
        assert not folder.exists()
        folder.mkdir()
        first.take()
        first.take()
        with RunLock(folder) as second, pytest.raises(InputError, match="is in use by another start of a run"):
            second.take()
    with RunLock(folder) as third:
        third.take()
    assert not list(folder.iterdir())
