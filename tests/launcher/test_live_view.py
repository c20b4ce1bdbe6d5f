"""Does the picture of a running run show how far it is, who is slow, and who does not run?"""

import io
from typing import Any

import pytest
from rich.console import Console

from launcher.starting.failures import RankReport
from launcher.starting.live_view import (
    MOST_LINES,
    MOST_RANKS,
    PlainView,
    TerminalView,
    headline,
    ranks_table,
    shown_line,
    slow_ranks,
)

MIB = 2**20


def report(rank: int, state: int | str = "running", node: str = "node0", frozen: str = "", **status: Any) -> RankReport:
    return RankReport(rank=rank, node=node, state=state, frozen=frozen, status=status)


def drawn(reports: list[RankReport]) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(ranks_table(reports))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_headline() -> None:
    assert headline([], None) == "starting"
    assert headline([report(0), report(1, phase="load")], None) == "starting"
    assert headline([report(1, phase="x"), report(0, phase="load")], None) == "load"
    status: dict[str, Any] = {
        "phase": "train",
        "step": 120,
        "num_steps": 1000,
        "loss": 1.23456,
        "tokens_per_second": 12340.0,
    }
    assert headline([report(0, **status)], None) == "step 120/1000  loss 1.2346  12.3k tok/s  – left  checkpoint –"
    found = headline([report(0, **status, checkpoint=100)], 2.0)
    assert found == "step 120/1000  loss 1.2346  12.3k tok/s  29 min 20 s left  checkpoint 100"
    assert "12.3k tok/s  42% MFU  – left" in headline([report(0, **status, mfu=0.4167)], None)
    assert "loss –" in headline([report(0, **{**status, "loss": float("nan")})], None)


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([], set()),
        ([1.0], set()),
        ([1.0, 1.2, 1.1, 1.0], set()),
        ([1.0, 1.3, 1.0, 1.0], {1}),
        ([1.0, 1.5], {1}),
        ([1.0, None, 9.0, 1.0], {2}),
        ([0.0, 0.0], set()),
    ],
)
def test_slow_ranks(seconds: list[float | None], slow: set[int]) -> None:
    assert slow_ranks([report(rank, forward_seconds=found) for rank, found in enumerate(seconds)]) == slow


def test_every_rank_has_a_line() -> None:
    lines = drawn(
        [
            report(1, node="node1", phase="train", step=7, forward_seconds=0.5, memory_bytes=1500 * MIB),
            report(0, phase="train", step=7, forward_seconds=0.2, memory_bytes=1400 * MIB),
            report(2, node="node1", phase="train", step=7, forward_seconds=0.2, frozen="stopped by a signal"),
            report(3, "lost", node="node1", phase="save"),
            report(4, 75, node="node1"),
            report(5, 0, node="node1"),
        ]
    )
    assert lines == [
        "rank  node   phase  step  forward    memory",
        "   0  node0  train     7   200 ms  1.37 GiB",
        "   1  node1  train     7   500 ms  1.46 GiB  slow",
        "   2  node1  train     7   200 ms         –  stopped by a signal",
        "   3  node1  save      –        –         –  lost",
        "   4  node1  start     –        –         –  ended with 75",
        "   5  node1  start     –        –         –  ended",
    ]


def test_of_many_ranks_every_node_has_a_line() -> None:
    reports = [
        report(
            rank, node=f"node{rank // 8}", ticks=rank, phase="train", step=rank, forward_seconds=0.1, memory_bytes=MIB
        )
        for rank in range(24)
    ]
    assert len(reports) > MOST_RANKS
    reports[10] = report(10, node="node1", ticks=10, phase="train", step=10, frozen="stopped by a signal")
    reports[23] = report(23, node="node2", ticks=99, phase="train", step=23, forward_seconds=3.25, memory_bytes=2 * MIB)
    assert drawn(reports) == [
        "ranks  node   phase  step  forward    memory",
        "    8  node0  train     0   100 ms  1.00 MiB",
        "    8  node1  train     8   100 ms  1.00 MiB  rank 10 stopped by a signal",
        "    8  node2  train    16   3.25 s  2.00 MiB  rank 23 slow",
    ]


def test_the_picture_stays_below_the_words_and_counts_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("launcher.starting.live_view.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=80, height=30, force_terminal=True, color_system=None)
    with TerminalView(console, "runs/mine [bold]x") as view:
        for step in (1, 2, 2, 3):
            now[0] += 2.0
            view.update([report(0, phase="train", step=step, num_steps=10, loss=1.0)])
        view.say("err", "step 3: validation loss 1.0 [red]\nanother\n")
        assert isinstance(console.file, io.StringIO)
        console.file.truncate(0)
        view._live.refresh()
        lines = console.file.getvalue().splitlines()
    assert any("runs/mine [bold]x" in line for line in lines)
    # 2 steps in 6 seconds, 7 steps left.
    assert any("step 3/10" in line and "21.0 s left" in line for line in lines), lines
    assert any(line.startswith("rank  node") for line in lines)
    # A restart goes back to its checkpoint, and begins to count anew.
    view.update([report(0, phase="train", step=1, num_steps=10)])
    assert view._seconds_of_step() is None


def test_words_only(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainView() as view:
        view.say("out", "a result")
        view.say("err", "an error")
        for _ in range(2):
            view.update([report(0), report(1, node="node1", frozen="stopped by a signal")])
    captured = capsys.readouterr()
    assert captured.out == "a result"
    assert captured.err == "an errorsparse-zero: rank 1 on node1 stopped by a signal\n"


def test_standard_output_that_goes_elsewhere_gets_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), width=80, height=30, force_terminal=True, color_system=None)
    with TerminalView(console, "runs/mine") as view:
        view.say("out", "a result :key:\n")
        view.say("err", "words\n")
    assert capsys.readouterr().out == "a result :key:\n"
    assert isinstance(console.file, io.StringIO)
    assert "words" in console.file.getvalue()
    assert "a result" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("line", "plain"),
    [
        ("\x1b]0;title\x07a\x1b[2Jb\x1b[3A\x07c\x00", "0;titleabc"),  # Nothing that it would obey.
        ("layer :key: [red]3[/red]", "layer :key: [red]3[/red]"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("10%\r20%\r30%", "30%"),
        ("done\r", "done"),
        ("größer\t1", "größer\t1"),
    ],
)
def test_a_line_cannot_take_the_terminal(line: str, plain: str) -> None:
    found = shown_line(line)
    assert found.plain == plain
    assert bool(found.spans) == ("\x1b[31m" in line)


def test_of_hundreds_of_nodes_the_worst_are_shown() -> None:
    reports = [report(rank, node=f"node{rank}", ticks=rank, phase="train", step=1) for rank in range(300)]
    reports[250] = report(250, "lost", node="node250")
    lines = drawn(reports)
    assert len(lines) == MOST_LINES + 2
    assert "rank 250 lost" in lines[1]
    assert lines[-1].strip() == "and 284 nodes more"
