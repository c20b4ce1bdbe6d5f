"""Does a timeline tell what lived where, and in which part of a run?"""

import pytest
import torch

from sparse_zero.memory.simulation.recorder import MemoryRecorder
from sparse_zero.memory.simulation.timeline import Span, Storage, Timeline


def storage(num_bytes: int, born: int, died: int | None, module: str = "", **fields: object) -> Storage:
    return Storage(num_bytes=num_bytes, born=born, died=died, module=module, **fields)  # type: ignore[arg-type]


@pytest.fixture
def timeline() -> Timeline:
    """Weights, what two layers keep, a buffer on the host, and something that dies at once; ten events."""
    storages = [
        storage(100, 0, None, kind="weights"),
        storage(7, 1, None, kind="optimizer", place="host"),
        storage(10, 2, 9, "layers.0", kind="activations"),
        storage(50, 3, 4, "layers.0", kind="temporaries"),
        storage(20, 5, 8, "layers.1", kind="activations"),
        storage(5, 6, 7, "layers.1", kind="temporaries", place="host"),
    ]
    spans = [
        Span(phase="load", role="load", first=0, end=2),
        Span(phase="forward", role="forward", first=2, end=8),
        Span(phase="backward", role="backward", first=8, end=10),
    ]
    modules = ["", "", *["layers.0"] * 3, *["layers.1"] * 4, ""]
    return Timeline(storages, spans, modules)


def test_places_are_counted_apart(timeline: Timeline) -> None:
    assert timeline.peak().num_bytes == 160
    assert timeline.peak().module == "layers.0"
    assert timeline.peak().by_kind == {"weights": 100, "activations": 10, "temporaries": 50}
    host = timeline.peak(place="host")
    assert (host.num_bytes, host.by_kind) == (12, {"optimizer": 7, "temporaries": 5})
    assert timeline.at_end("backward").num_bytes == 100
    row = timeline.to_json()["forward"]
    assert (row["peak_bytes"], row["end_bytes"], row["host_bytes"]) == (160, 130, 12)
    assert row["host_by_kind"] == {"optimizer": 7, "temporaries": 5}


def test_what_is_kept_is_told_by_module(timeline: Timeline) -> None:
    assert timeline.kept("forward") == {"layers.0": 10, "layers.1": 20}
    assert timeline.kept("backward") == {}
    assert timeline.kept("forward", "optimizer", "host") == {"": 7}


@pytest.mark.parametrize("num_rows", [3, 1000])
def test_a_sampled_table_keeps_the_peak_of_each_part(timeline: Timeline, num_rows: int) -> None:
    table = timeline.sampled(num_rows)
    columns = [table["phase"], table["event"], table["module"], *table["bytes"].values()]
    assert len({len(column) for column in columns}) == 1
    totals = [sum(values) for values in zip(*table["bytes"].values(), strict=True)]
    for phase in timeline.phases():
        inside = [total for total, each in zip(totals, table["phase"], strict=True) if each == phase]
        assert max(inside) == timeline.peak(phase).num_bytes
    assert table["kept"] == {"layers.0": 10, "layers.1": 20}
    assert set(table["bytes"]) == {"weights", "activations", "temporaries"}


def test_a_phase_may_have_forward_and_backward_in_it() -> None:
    recorder = MemoryRecorder()
    with recorder, recorder.phase("calibration"):
        recorder.role("calibration", "forward")
        weight = torch.ones(64, requires_grad=True)
        product = (weight * 2).square()
        recorder.role("calibration", "backward")
        product.sum().backward()
        del product
    found = recorder.timeline()
    assert found.phases() == ["calibration"]
    assert [span.role for span in found.spans] == ["calibration", "forward", "backward"]
    at_end = found.at_end("calibration").by_kind
    # The weight was made in forward, its gradient in backward.
    assert at_end == {"logits": 256, "gradients": 256}
