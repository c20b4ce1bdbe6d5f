"""Do metrics survive interruptions, and are they plain JSON?"""

import json
import math
from pathlib import Path

import pytest

from launcher.metrics import MetricsLog, read_metrics
from sparse_zero.errors import InputError


def _train(step: int, loss: float = 1.0) -> dict[str, object]:
    return {"kind": "train", "step": step, "loss": loss, "skipped": not math.isfinite(loss)}


def _steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl")]


def test_rows_are_visible_before_the_log_is_closed(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run") as log:
        log.write(_train(1, 0.5))
        log.event(1, "saved ✓")
        assert read_metrics(log.path) == [_train(1, 0.5), {"kind": "event", "step": 1, "event": "saved ✓"}]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write({**_train(1, math.nan), "gradient_norm": math.inf, "nested": [1.0, -math.inf]})
    text = log.path.read_text()
    assert json.loads(text) == {
        "kind": "train", "step": 1, "loss": None, "skipped": True, "gradient_norm": None, "nested": [1.0, None],
    }  # fmt: skip
    assert "NaN" not in text


def test_resuming_drops_later_steps_and_a_cut_line(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write(_train(step))
        log.event(3, "checkpoint")
    with log.path.open("ab") as file:
        file.write(b'{"kind": "train", "step": 6, "lo\xc3')
    with MetricsLog(tmp_path, resumed_step=3) as log:
        assert _steps(tmp_path) == [1, 2, 3, 3]
        log.write(_train(4, 7.0))
    assert read_metrics(log.path)[-1] == _train(4, 7.0)
    assert not list(tmp_path.glob(".*")), "the temporary file is gone"


def test_a_new_run_begins_with_an_empty_file(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(_train(1))
    with MetricsLog(tmp_path):
        assert _steps(tmp_path) == []


def test_resuming_without_a_file_starts_one(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, resumed_step=10) as log:
        log.write(_train(11))
    assert _steps(tmp_path) == [11]


@pytest.mark.parametrize("line", ["{not json", "[1, 2]", '{"kind": "train"}', '{"kind": "other", "step": 1}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(_train(1)) + "\n" + line + "\n" + json.dumps(_train(2)) + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2 "):
        read_metrics(path)
    with pytest.raises(InputError, match="line 2"):
        MetricsLog(tmp_path, resumed_step=1)
    assert path.read_text().count("\n") == 3, "a refused file stays as it was"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    "row", [{"kind": "train"}, {"step": 1}, {"kind": "other", "step": 1}, {"kind": "train", "step": 1.0}]
)
def test_a_row_without_a_place_is_refused(tmp_path: Path, row: dict[str, object]) -> None:
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="needs a kind"):
        log.write(row)


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with MetricsLog(tmp_path, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.write({**_train(step, 0.5 * step), "response_tokens": 10 * step})
        log.write(_train(4, math.nan))
        log.event(4, "skipped a step")
    # Continued from step 2: what TensorBoard saw of later steps is withdrawn.
    with MetricsLog(tmp_path, tensorboard=True, resumed_step=2) as log:
        log.write(_train(3, 9.0))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/response_tokens"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 0.5),
        (2, 1.0),
        (3, 9.0),
    ]


def test_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> object:
        if name.startswith("tensorboard"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="tensorboard")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(InputError, match=r"sparse-zero\[tracking\]"):
        MetricsLog(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists(), "nothing is written before the refusal"
