"""Is what a rank writes read once, kept where the run's folder is its own, and cut down to what explains its end?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.pulse import FIELDS, Pulse
from launcher.starting.node_guard import node_folder
from launcher.starting.rank_logs import RankLog, last_error, ranks_that_wrote, redirect, stream_file
from launcher.starting.rank_status import STATUS_BYTES, status_file


def write(folder: Path, text: str, descriptor: int = 2, rank: int = 1) -> None:
    with stream_file(folder, rank, descriptor).open("a") as file:
        file.write(text)


def test_nothing_is_kept_before_the_folder_is_the_runs_own_and_then_everything(tmp_path: Path) -> None:
    logs = tmp_path / "run" / "logs"
    (tmp_path / "run").mkdir()
    log = RankLog(tmp_path, 1, logs)
    log.read()  # There is nothing yet.
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
    assert lines == ["a result", "loading", "an error"]  # Of what is kept at once, standard output first.
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
    assert not log.is_kept
    assert log.last_words() == ""  # Told once.


def test_of_rank_0_both_streams_are_passed_on_once(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 0, None)
    write(tmp_path, "loss 1\n", rank=0)
    write(tmp_path, "summary\n", descriptor=1, rank=0)
    log.read(keeps=False)
    assert log.take() == [("out", "summary\n"), ("err", "loss 1\n")]
    assert log.take() == []


LINE = "x" * 99 + "\n"


def test_a_rank_that_writes_without_end_is_read_in_pieces_and_kept_whole(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 0, tmp_path)
    write(tmp_path, LINE * 60_000, rank=0)
    write(tmp_path, "Traceback (most recent call last):\n  x\nE: the end", rank=0)
    log.read(keeps=True)
    kept = tmp_path / "rank-0.log"
    assert 1 << 20 < kept.stat().st_size < 5 << 20
    # A launcher that was stopped meanwhile is not flooded, and is told so.
    (note, *taken) = log.take()
    assert "left out" in note[1]
    assert sum(len(text) for _, text in taken) <= 1 << 18
    assert all(text.endswith("\n") for _, text in taken)
    # Of a rank that has ended, the rest is read at once, and its end is what it said.
    log.read(has_ended=True)
    assert log.last_words().splitlines()[-1] == "E: the end"
    heading, _, text = kept.read_text().partition("\n")
    assert heading.startswith("== rank 0")
    assert text.startswith(LINE * 60_000 + "Traceback")
    assert text.endswith("E: the end")


def test_what_is_kept_gives_its_room_back_while_the_rank_goes_on(tmp_path: Path) -> None:
    redirected = tmp_path / "guard"
    redirected.mkdir()
    log = RankLog(redirected, 1, tmp_path)
    with stream_file(redirected, 1, 2).open("ab") as rank:
        for number in range(5):
            rank.write(f"{number}\n".encode() + LINE.encode() * 30_000)
            rank.flush()
            log.read(keeps=True)
    size = stream_file(redirected, 1, 2).stat()
    assert size.st_size == 5 * (2 + 3_000_000)
    assert size.st_blocks * 512 < 4 << 20
    lines = (tmp_path / "rank-1.log").read_text().splitlines()[1:]
    assert lines == [line for number in range(5) for line in [str(number), *[LINE[:-1]] * 30_000]]


def test_a_disk_that_is_full_for_a_while_leaves_nothing_out_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RankLog(tmp_path, 1, tmp_path)
    write(tmp_path, LINE * 100)
    real, room = os.write, [250]

    def limited(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        number = real(descriptor, data[: room[0]])
        room[0] -= number
        return number

    monkeypatch.setattr(os, "write", limited)
    for more in (0, 300, 0, 5000, 10**6):
        room[0] += more
        log.read(keeps=True)
    assert (tmp_path / "rank-1.log").read_text().split("\n", 1)[1] == LINE * 100


def test_a_line_is_never_torn_while_its_rank_lives(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 0, None)
    with stream_file(tmp_path, 0, 2).open("ab") as rank:
        for piece in ("gr\u00f6".encode()[:3], "gr\u00f6".encode()[3:] + b"\xc3", b"\x9fer\nnext"):
            rank.write(piece)
            rank.flush()
            log.read()
    assert log.take() == [("err", "gr\u00f6\u00dfer\n")]
    log.read(has_ended=True)
    assert log.take() == [("err", "next")]


def test_which_ranks_wrote(tmp_path: Path) -> None:
    assert ranks_that_wrote(tmp_path) == []
    for name in ("rank-0.err", "rank-12.err", "rank-x.err", "rank-3.out", "rank-4.status"):
        (tmp_path / name).touch()
    assert ranks_that_wrote(tmp_path) == [0, 12]
    code = f"from pathlib import Path; from launcher.starting.rank_logs import redirect; redirect(Path({str(tmp_path)!r}), '7')"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-u", "-c", f"{code}; import os; print('to out'); os.write(2, b'to err')"]
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == (b"", b"")
    assert ranks_that_wrote(tmp_path) == [0, 7, 12]
    assert [stream_file(tmp_path, 7, number).read_text() for number in (1, 2)] == ["to out\n", "to err"]
    redirect(tmp_path / "missing", "1")  # Nothing happens.


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
    mark = log.mark()
    write(tmp_path, "thread\n" * 5000 + "main thread\n")
    log.read(keeps=False)
    assert log.since(mark).endswith("thread\nmain thread\n")
    assert len(log.since(mark)) <= 20_000


# --- the status ----------------------------------------------------------------------------------------------


def status(record: Path, rank: int) -> dict[str, object]:
    text = status_file(node_folder(record), rank).read_bytes()
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
