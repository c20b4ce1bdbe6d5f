"""Is what a rank writes read once, kept where the run's folder is its own, and cut down to what explains its end?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.pulse import FIELDS, Pulse
from launcher.starting.node_guard import STATUS_BYTES, node_folder, status_name
from launcher.starting.rank_logs import RankLog, last_error, stream_file


def write(folder: Path, text: str, descriptor: int = 2, rank: int = 1) -> None:
    with stream_file(folder, rank, descriptor).open("a") as file:
        file.write(text)


def test_nothing_is_kept_before_the_folder_is_the_runs_own_and_then_everything(tmp_path: Path) -> None:
    logs = tmp_path / "run" / "logs"
    (tmp_path / "run").mkdir()
    log = RankLog(tmp_path, 1, logs)
    log.read(keeps=True)  # There is nothing yet.
    write(tmp_path, "loading\n")
    log.read(keeps=False)
    assert not logs.exists()
    write(tmp_path, "a result\n", descriptor=1)
    log.read(keeps=True)
    log.read(keeps=True)
    write(tmp_path, "an error\n")
    log.read(keeps=True)
    heading, *lines = (logs / "rank-1.log").read_text().splitlines()
    assert heading.startswith("== rank 1 on ")
    assert lines == ["loading", "a result", "an error"]
    # Another start continues the file.
    again = RankLog(tmp_path, 1, logs)
    again.read(keeps=True)
    assert (logs / "rank-1.log").read_text().count("== rank 1 on ") == 2
    assert log.take() == []  # Only rank 0 is passed on.


def test_a_log_that_cannot_be_kept_is_no_reason_to_stop(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 1, tmp_path / "no folder" / "logs")
    write(tmp_path, "words\n")
    log.read(keeps=True)
    assert log.last_words() == "words"


def test_of_rank_0_both_streams_are_passed_on_once(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 0, None)
    write(tmp_path, "loss 1\n", rank=0)
    write(tmp_path, "summary\n", descriptor=1, rank=0)
    log.read(keeps=False)
    assert log.take() == [("out", "summary\n"), ("err", "loss 1\n")]
    assert log.take() == []


def test_a_rank_that_writes_without_end_is_read_in_pieces_of_whole_lines(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 0, None)
    line = "x" * 99 + "\n"
    write(tmp_path, line * 60_000, rank=0)
    found = ""
    for _ in range(3):
        log.read(keeps=False)
        taken = log.take()
        assert sum(len(text) for _, text in taken) <= 1 << 22
        assert all(text.endswith("\n") for _, text in taken)
        found += "".join(text for _, text in taken)
    assert found == line * 60_000


def test_last_words_are_the_last_traceback_or_the_last_lines() -> None:
    text = "warning\nTraceback (most recent call last):\n  old\nOldError\nmore\nTraceback (most recent call last):\n  new\nE: x\n"
    assert last_error(text) == "Traceback (most recent call last):\n  new\nE: x"
    assert last_error("".join(f"{number}\n" for number in range(30))).splitlines() == [str(n) for n in range(20, 30)]
    long = "Traceback (most recent call last):\n" + "  frame\n" * 100 + "E: x"
    assert last_error(long, most_lines=5).splitlines() == ["...", *["  frame"] * 4, "E: x"]
    ours = "Traceback (most recent call last):\n  x\nE: handled\nsparse-zero: error: lost the connection\n  more"
    assert last_error(ours) == "sparse-zero: error: lost the connection\n  more"


def test_last_words_of_a_crash_are_the_thread_that_crashed() -> None:
    other = "Thread 0x1 (most recent call first):\n" + "  File x\n" * 50
    crash = (
        f"Fatal Python error: Aborted\n\n{other}\nCurrent thread 0x2 (most recent call first):\n  File a\n  File b\n"
    )
    expected = ["Fatal Python error: Aborted", "Current thread 0x2 (most recent call first):", "  File a", "  File b"]
    assert last_error(f"words\n{crash}\nExtension modules: numpy\n").splitlines() == expected
    assert last_error(crash, most_lines=2).splitlines() == [*expected[:3], "..."]


def test_what_came_after_a_mark(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 1, None)
    write(tmp_path, "before\n")
    log.read(keeps=False)
    mark = log.mark()
    assert log.since(mark) == ""
    write(tmp_path, "stacks\n")
    write(tmp_path, "not an error\n", descriptor=1)
    log.read(keeps=False)
    assert log.since(mark) == "stacks\n"


# --- the status ----------------------------------------------------------------------------------------------


def status(record: Path, rank: int) -> dict[str, object]:
    text = Path(node_folder(record), status_name(rank)).read_bytes()
    assert len(text) == STATUS_BYTES
    found: dict[str, object] = json.loads(text)
    return found


def test_a_status_says_what_it_was_told_last(tmp_path: Path) -> None:
    node_folder(tmp_path).mkdir()
    pulse = Pulse(str(tmp_path), 3)
    assert status(tmp_path, 3) == {"ticks": 0, "phase": "start", "is_ticking": False, "owns_folder": False}
    with pulse.phase("train", ticks=True):
        pulse.tick(step=2, num_steps=10, loss=float("nan"))
        found = status(tmp_path, 3)
        assert (found["phase"], found["is_ticking"], found["step"], found["num_steps"]) == ("train", True, 2, 10)
        with pulse.phase("save"):
            assert status(tmp_path, 3)["is_ticking"] is False
        assert status(tmp_path, 3)["phase"] == "train"
    assert status(tmp_path, 3)["phase"] == "start"
    assert status(tmp_path, 3)["ticks"] == 5
    with pytest.raises(AssertionError):
        pulse.tick(unknown=1)


def test_the_phase_in_which_it_failed_stays(tmp_path: Path) -> None:
    node_folder(tmp_path).mkdir()
    pulse = Pulse(str(tmp_path), 0)
    with pytest.raises(ValueError, match="full"), pulse.phase("save"):
        raise ValueError("full")
    assert status(tmp_path, 0)["phase"] == "save"


@pytest.mark.parametrize("record", [None, "missing"])
def test_without_a_guard_nothing_is_written(record: str | None, tmp_path: Path) -> None:
    pulse = Pulse(record and str(tmp_path / record), 0)
    pulse.tick(**dict.fromkeys(FIELDS[4:], 1))
    assert not list(tmp_path.iterdir())


def test_a_rank_that_has_a_status_tells_its_stacks_when_asked(tmp_path: Path) -> None:
    node_folder(tmp_path).mkdir()
    code = (
        "import os, signal, sys, time; from launcher.pulse import Pulse, STACKS_SIGNAL\n"
        "def waits_here():\n    os.kill(os.getpid(), STACKS_SIGNAL); time.sleep(0.1); os.kill(os.getpid(), signal.SIGSEGV)\n"
        f"Pulse({str(tmp_path)!r}, 0); waits_here()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == -11
    assert done.stderr.count("in waits_here") == 2
    assert "Fatal Python error: Segmentation fault" in done.stderr
