"""Does the final table say everything, in 80 columns?"""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from launcher.summary import (
    format_bytes,
    format_count,
    format_duration,
    format_percent,
    load_summary,
    print_summary,
    summary_rows,
)
from sparse_zero.errors import InputError
from tests.launcher.synthetic_run import summary, write_run


def _print(folder: Path, width: int = 200) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_summary(folder, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_table_says_everything_in_80_columns(tmp_path: Path) -> None:
    lines = _print(write_run(tmp_path / "run"))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for part in (
        "0.00 % → 47.0 %  (+47.0 points, 200 problems)", "2.3125 → 2.3750  (+0.0625 a token, 16,384 tokens)", "1,376,256 of 134,515,008  (1.02 %)", "1.35 GiB, 1.33 GiB",
        "10.5 MiB  (gradients 5.25 MiB, values 5.25 MiB)", "612", "5.30 MiB", "513 MiB", "4.1 s", "7 min 51 s", "10 min 21 s", "0.3622",
    ):  # fmt: skip
        assert part in text


def test_a_large_run_fits_too(tmp_path: Path) -> None:
    content = summary() | {
        "parameters": {"total": 70_553_706_496, "trained": 1_234_567_890},
        "accuracy": {"base": 0.98765, "tuned": 0.5, "num_problems": 123_456},
        "peak_memory_bytes_per_rank": [80_000_000_000 + rank for rank in range(1024)],
        "tokens_per_second": 1_234_567.8,
        "merged_bytes": 140_000_000_000,
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(content))
    lines = _print(folder)
    assert max(map(len, lines)) <= 80
    rows = dict(summary_rows(content))
    assert rows["Peak memory per rank"] == "74.5 GiB to 74.5 GiB  (1024 ranks, most: rank 1023)"
    assert all(any(value in line for line in lines) for value in rows.values()), "no value is wrapped"


def test_what_was_not_measured_is_marked() -> None:
    rows = dict(summary_rows({}))
    assert rows.pop("Accuracy before → after") == "not evaluated"
    assert set(rows.values()) == {"–"}
    partial = summary() | {
        "accuracy": {"base": 0.1, "tuned": None, "num_problems": 5},
        "merged_bytes": None,
        "phases": {},
    }
    rows = dict(summary_rows(partial))
    assert rows["Accuracy before → after"] == "10.0 % → –"
    assert rows["Merged model"] == "–"
    assert not any(name.startswith("Time") for name in rows)


def test_communication_is_told_by_what_is_carried() -> None:
    def row(**terms: object) -> str:
        return dict(summary_rows({"communication_bytes_per_step": terms}))["Reduced, gathered a step"]

    assert row(gradients=0, values=0, weights=0, constants=0) == "none: one rank"
    assert row(gradients=1000, values=0, weights=10**9, constants=24) == (
        "954 MiB  (gradients 0.98 KiB, weights 954 MiB)"
    )
    assert row(gradients="many", values=0, weights=0, constants=0) == row(gradients=1) == "–"


def test_unknown_phases_are_shown_after_the_known_ones() -> None:
    rows = summary_rows({"phases": {"warm_up": 1.0, "train": 2.0, "load": None}})
    assert rows[-4:] == [
        ("Time, loading", "–"), ("Time, training", "2.0 s"), ("Time, warm up", "1.0 s"), ("Time, total", "3.0 s"),
    ]  # fmt: skip


def test_a_continued_run_says_that_its_times_are_those_of_the_last_start(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").write_text(json.dumps(summary() | {"resumed_after_step": 1_234_567}))
    lines = _print(folder)
    assert max(map(len, lines)) <= 80
    (line,) = [line for line in lines if "Continued" in line]
    assert line.split("  ", 1)[0].strip() == "Continued after step"
    assert line.strip().endswith("1,234,567; the times are those of the last start")
    for start in (0, None, "7"):
        assert "Continued after step" not in dict(summary_rows(summary() | {"resumed_after_step": start}))


def test_damaged_values_are_marked_like_missing_ones() -> None:
    for damage in ([1], "7", 3, True):
        rows = summary_rows(dict.fromkeys(summary(), damage))
        assert dict(rows)["Accuracy before → after"] == "not evaluated"
        assert dict(rows)["Parameters trained"] == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (1536, "1.50 KiB"), (10 * 2**20, "10.0 MiB"), (3e12, "2794 GiB"),
     (None, "–"), (math.nan, "–"), ("7", "–")],
)  # fmt: skip
def test_bytes(value: object, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1.00k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (6.74e9, "6.74B"),
        (math.inf, "–"),
    ],
)
def test_counts(value: object, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (7384, "2 h 03 min"),
        (None, "–"),
    ],
)
def test_durations(value: object, text: str) -> None:
    assert format_duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00 %"), (0.00412, "0.412 %"), (0.0102, "1.02 %"), (0.47, "47.0 %"), (1, "100.0 %")],
)
def test_percent(value: object, text: str) -> None:
    assert format_percent(value) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has not ended"),
        ("{", "is no valid JSON"),
        ("[]", "holds a list"),
        (b"\xff", "is no valid JSON"),
    ],
)
def test_a_summary_that_cannot_be_read_is_named(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        load_summary(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_summary(tmp_path / "nowhere")
