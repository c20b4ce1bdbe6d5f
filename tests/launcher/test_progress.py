"""Does progress suit the terminal, the log file and the silent ranks?"""

import io
import re

from rich.console import Console

from launcher.progress import BarProgress, LineProgress, SilentProgress, describe_step, training_progress


def _row(step: int, **changes: object) -> dict[str, object]:
    row = {
        "kind": "train", "step": step, "loss": 1.23456, "learning_rate": 0.003, "tokens_per_second": 1234.5,
        "peak_memory_bytes": 1_450_000_000, "skipped": False,
    }  # fmt: skip
    return row | changes


def _console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None, legacy_windows=False)


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_other_ranks_show_nothing() -> None:
    console = _console(terminal=True)
    progress = training_progress(num_steps=3, rank=1, console=console)
    assert isinstance(progress, SilentProgress)
    with progress:
        progress.update(_row(1))
        progress.message("hello")
    assert _text(console) == ""


def test_a_log_file_gets_a_line_now_and_then() -> None:
    console, now = _console(terminal=False), [0.0]
    progress = training_progress(num_steps=100, rank=0, console=console, line_seconds=30, clock=lambda: now[0])
    assert isinstance(progress, LineProgress)
    with progress:
        for step in range(1, 101):
            now[0] = 2.0 * step
            progress.update(_row(step))
    lines = _text(console).splitlines()
    # At 2 s a step: the first, every fifteenth after it, and the last.
    assert [int(re.match(r"step (\d+)/100", line)[1]) for line in lines] == [1, 16, 31, 46, 61, 76, 91, 100]
    assert lines[1] == "step 16/100  loss 1.2346  lr 3.00e-03  1.23k tok/s  1.35 GiB  ETA 2 min 48 s"


def test_steps_before_the_resumed_one_do_not_count_as_speed() -> None:
    console, now = _console(terminal=False), [0.0]
    with training_progress(num_steps=100, rank=0, first_step=90, console=console, clock=lambda: now[0]) as progress:
        now[0] = 5.0
        progress.update(_row(91))
    assert _text(console).endswith("ETA 45.0 s\n")


def test_messages_keep_brackets_and_are_not_wrapped() -> None:
    console = _console(terminal=False)
    with training_progress(num_steps=1, rank=0, console=console) as progress:
        progress.message("[bold]" + "x" * 100)
    assert _text(console) == "[bold]" + "x" * 100 + "\n"


def test_the_bar_shows_every_number_in_80_columns() -> None:
    console = _console(terminal=True)
    progress = training_progress(num_steps=1500, rank=0, console=console)
    assert isinstance(progress, BarProgress)
    with progress:
        progress.update(_row(1499))
        progress.message("saved [checkpoint]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", _text(console))
    assert "saved [checkpoint]" in text
    lines = [line for line in re.split(r"[\r\n]+", text) if "1499/1500" in line]
    assert lines
    for line in lines:
        assert len(line) <= 80
        assert "loss 1.2346  lr 3.00e-03  1.23k tok/s  1.35 GiB" in line
        assert re.search(r"\d:\d\d|--:--", line), "the time left"


def test_the_bar_has_room_for_an_mfu() -> None:
    console = _console(terminal=True)
    with training_progress(num_steps=1500, rank=0, console=console) as progress:
        progress.update(_row(1499, mfu=0.4167))
    lines = [line for line in re.split(r"[\r\n]+", _text(console)) if "1499/1500" in line]
    assert lines
    for line in lines:
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)
        assert len(shown) <= 80
        assert "tok/s  42% MFU  1.35 GiB" in shown


def test_missing_and_skipped_numbers_are_said() -> None:
    assert describe_step({"step": 1}) == "loss –  lr –  – tok/s  –"
    assert describe_step(_row(1, skipped=True, loss=None)).startswith("loss skipped  lr 3.00e-03")
    assert len(describe_step(_row(1, loss=float("nan"), tokens_per_second=999_999.0))) <= 52
    assert describe_step(_row(1, mfu=0.4167)) == "loss 1.2346  lr 3.00e-03  1.23k tok/s  42% MFU  1.35 GiB"
