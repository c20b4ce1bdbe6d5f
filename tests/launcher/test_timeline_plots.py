"""Do the pictures of a simulated step show its kinds, parts, layers and peak?"""

import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from launcher.memory.timeline_plots import kept_figure, plot_timeline, read_timeline, timeline_figure
from sparse_zero.files import atomic_write_json

GIB = 2**30


@pytest.fixture
def table() -> dict[str, Any]:
    """Two steps, of which the second is shown: 2 layers, the most at the loss."""
    phases = ["load", "forward", "backward", "step", *["forward"] * 3, *["backward"] * 3, "step"]
    modules = [
        "", "", "", "", "model.layers.0.self_attn", "model.layers.1.mlp", "lm_head", "", "model.layers.1",
        "model.layers.0", "",
    ]  # fmt: skip
    return {
        "phase": phases,
        "number": [0, 0, 0, 0, *[1] * 7],
        "event": list(range(0, 110, 10)),
        "module": modules,
        "bytes": {
            "weights": [GIB] * 11,
            "gradients": [1000] * 11,
            "activations": [0, 0, 0, 0, GIB, 2 * GIB, 2 * GIB, 2 * GIB, GIB, 0, 0],
            "logits": [0, 0, 0, 0, 0, 0, GIB, 9 * GIB // 2, 0, 0, 0],
        },
        "kept": {
            "model.layers.0.self_attn.q_proj": GIB,
            "model.layers.1.mlp": GIB,
            "model.layers.1.input_layernorm": GIB // 2,
            "model.norm": GIB // 4,
        },
    }


def texts(axes: Any) -> list[str]:
    return [each.get_text() for each in axes.texts]


def test_a_step_is_stacked_by_kind_with_its_parts_and_peak(table: dict[str, Any]) -> None:
    figure = timeline_figure(table, heading="a run")
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "a run"
    assert texts(axes) == ["peak 7.5 GiB, in backward", "forward", "backward", "step"]
    # What is a hair has its name in the legend only; layers appear in forward and when they are repeated.
    assert [each.get_label() for each in axes.collections] == ["gradients", "weights", "activations", "logits"]
    assert [each.get_text() for each in axes.get_xticklabels()] == ["0", "1", "1", "0"]
    assert axes.get_xlim() == (40, 100)
    assert axes.get_ylim()[1] > 7.5


def test_kept_activations_are_stacked_by_layer_and_part(table: dict[str, Any]) -> None:
    (axes,) = kept_figure(table, heading="a run").axes
    assert "2.75 GiB of activations" in axes.get_title(loc="left")
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights == {"attention": [1, 0, 0], "MLP": [0, 1, 0], "norms": [0, 0.5, 0], "others": [0, 0, 0.25]}
    assert [each.get_text() for each in axes.get_xticklabels()] == ["0", "1", "rest"]


def test_both_pictures_are_written_from_a_file(table: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    atomic_write_json(file, table)
    written = plot_timeline(read_timeline(file), tmp_path / "step.png", heading="a run")
    assert [path.name for path in written] == ["step.png", "step-kept.png"]
    for path in written:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width > 800
        assert height > 300
