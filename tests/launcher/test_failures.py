"""Is the rank named that explains the end of the others, or that holds them up?"""

from typing import Any

import pytest

from launcher.starting.failures import (
    HangWatch,
    RankReport,
    describe_hang,
    ended_first,
    holding_up,
    hung_stack,
)

TRACE = "Traceback (most recent call last):\n  File a\nKeyError: 'x'"
STACKS = (
    "Thread 0x01 (most recent call first):\n  File t.py, line 1 in background\n\n"
    "Current thread 0x02 (most recent call first):\n  File a.py, line 5 in all_reduce\n  File b.py, line 7 in step"
)


def report(
    rank: int, state: int | str = "running", words: str = "", frozen: str = "", stacks: str = "", **status: Any
) -> RankReport:
    node = f"node{rank}"
    return RankReport(rank=rank, node=node, state=state, frozen=frozen, status=status, words=words, stacks=stacks)


@pytest.mark.parametrize(
    ("reports", "order", "first"),
    [
        # Nobody failed; nobody said anything.
        ([report(0), report(1, 0, "bye")], {}, None),
        ([report(0, "lost"), report(1, 75)], {}, None),
        # An error before those who lost the connection, even when it was seen later.
        ([report(0, 75, "sparse-zero: error: lost the connection"), report(1, "lost", TRACE)], {0: 1.0, 1: 2.0}, 1),
        # An error before mere words; a refused input before the silent ones that agree.
        ([report(0, 2, "some warning"), report(1, 2, "sparse-zero: error: no such file")], {0: 1.0, 1: 2.0}, 1),
        # Of two errors, the earlier; at once, the lower rank.
        ([report(1, "lost", TRACE), report(2, "lost", TRACE)], {1: 2.0, 2: 1.0}, 2),
        ([report(2, "lost", TRACE), report(1, "lost", TRACE)], {1: 1.0, 2: 1.0}, 1),
        # One that was killed says nothing; those that lost the connection to it are no cause.
        ([report(3, "lost"), report(5, 75, "sparse-zero: error: lost the connection")], {3: 1.0, 5: 2.0}, None),
        ([report(4, 75), report(5, 75, "sparse-zero: error: lost the connection")], {4: 1.0, 5: 2.0}, 5),
        # A crash in a library.
        ([report(0, 75, "sparse-zero: error: x"), report(1, "lost", "Fatal Python error: Aborted")], {}, 1),
    ],
)
def test_the_rank_that_ended_first(reports: list[RankReport], order: dict[int, float], first: int | None) -> None:
    found = ended_first(reports, order)
    assert (None if found is None else found.rank) == first


# --- hangs ---------------------------------------------------------------------------------------------------


def watched(seconds: float | None, *looks: tuple[float, list[RankReport]]) -> list[bool]:
    watch = HangWatch(seconds, 0.0)
    return [watch.look(reports, now) for now, reports in looks]


def training(*ticks: int, frozen: str = "") -> list[RankReport]:
    return [report(rank, ticks=tick, is_ticking=True, frozen=frozen) for rank, tick in enumerate(ticks)]


def every_second(reports: list[RankReport], until: int) -> list[tuple[float, list[RankReport]]]:
    return [(float(second), reports) for second in range(1, until + 1)]


def test_a_run_hangs_when_no_rank_goes_on_for_too_long() -> None:
    assert watched(4.0, *every_second(training(5, 5), 6)) == [False] * 5 + [True]
    assert watched(None, *every_second(training(5, 5), 9)) == [False] * 9


def test_one_rank_that_goes_on_is_enough() -> None:
    looks = [(float(second), training(5, second // 3)) for second in range(1, 12)]
    assert not any(watched(4.0, *looks))


def test_loading_and_saving_may_take_long_unless_a_rank_does_not_run() -> None:
    mixed = [report(0, ticks=5, is_ticking=False), report(1, ticks=5, is_ticking=True)]
    assert not any(watched(4.0, *every_second(mixed, 12)))
    frozen = [report(0, ticks=5, is_ticking=False, frozen="stopped by a signal"), mixed[1]]
    assert watched(4.0, *every_second(frozen, 6))[-1]
    # A rank that has said nothing yet may be starting.
    assert not any(watched(4.0, *every_second([report(0), *training(1)], 12)))


def test_ranks_that_have_ended_do_not_count() -> None:
    assert watched(4.0, *every_second([report(0, 0), report(1, ticks=3, is_ticking=True)], 6))[-1]
    assert not any(watched(4.0, *every_second([report(0, 0), report(1, 0)], 9)))


def test_what_was_seen_after_a_pause_is_old() -> None:
    """The launching process was stopped by Ctrl-Z for a minute: the reports of that minute are not read yet."""
    looks = [(1.0, training(5, 5)), (61.0, training(5, 5)), (62.0, training(5, 5)), (66.0, training(5, 5))]
    assert watched(4.5, *looks) == [False, False, False, True]


def done(rank: int, step: int, micro_batch: int, **others: str) -> RankReport:
    return report(rank, phase="train", is_ticking=True, step=step, micro_batch=micro_batch, **others)


@pytest.mark.parametrize(
    ("reports", "ranks", "words"),
    [
        (
            [done(0, 7, 2), done(1, 7, 1), done(2, 7, 2)],
            [1],
            "no step for 9 seconds (cluster.hang_timeout): rank 1 on node1 is behind (7 steps and 1 micro-batches done)",
        ),
        (
            [done(0, 7, 0), done(1, 6, 3)],
            [1],
            "no step for 9 seconds (cluster.hang_timeout): rank 1 on node1 is behind (6 "
            "steps and 3 micro-batches done)",
        ),
        ([done(0, 7, 2), done(1, 7, 2)], [], "no step for 9 seconds (cluster.hang_timeout): all ranks wait"),
        # Shares of calibration differ.
        (training(5, 4, 5), [], "no step for 9 seconds (cluster.hang_timeout): all ranks wait"),
        (
            [done(0, 7, 2), done(1, 7, 1), report(2, ticks=5, frozen="stopped by a signal")],
            [2],
            "no step for 9 seconds (cluster.hang_timeout): rank 2 on node2 stopped by a signal",
        ),
    ],
)
def test_who_holds_the_others_up(reports: list[RankReport], ranks: list[int], words: str) -> None:
    assert [found.rank for found in holding_up(reports)] == ranks
    assert describe_hang(reports, 9.0) == words


def test_a_whole_node_that_was_suspended_is_not_listed_rank_by_rank() -> None:
    reports = [report(rank, frozen="stopped by a signal") for rank in range(64)]
    assert describe_hang(reports, 60.0).endswith("; 60 more")


def test_the_stack_that_is_shown() -> None:
    assert hung_stack([report(0), report(1)]) is None
    # The main thread's, of the rank that is behind; a frozen one cannot give any.
    reports = [done(0, 7, 2, stacks=STACKS.replace("step", "other")), done(1, 7, 1, stacks=STACKS)]
    found = hung_stack(reports)
    assert found is not None
    assert found[0].rank == 1
    assert found[1].splitlines()[1:] == ["  File a.py, line 5 in all_reduce", "  File b.py, line 7 in step"]
    frozen = hung_stack([report(0, stacks=STACKS), report(1, frozen="stopped by a signal")])
    assert frozen is not None
    assert frozen[0].rank == 0
    deep = STACKS + "\n  File c.py, line 1 in f" * 50
    cut = hung_stack([report(0, stacks=deep)])
    assert cut is not None
    assert len(cut[1].splitlines()) == 15
