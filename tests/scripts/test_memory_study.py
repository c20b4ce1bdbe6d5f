"""Does a memory study compute what it shows, write what it promises, and name what is wrong with its config?"""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from scripts import memory_study
from scripts.memory import study_report
from scripts.memory_study import load_study
from sparse_zero.errors import InputError

pandas: Any = importlib.import_module("pandas")
SHIPPED = Path("configs/studies/memory.yaml")
TINY = """
base: {model: smollm2-135m, world_size: 2, length: 256}
methods: [smt, full]
world_sizes: [1, 8]
stages: [2, 3]
lengths: [256, 1024]
micro_batches: [1, 4]
budgets: [0.01, 0.05]
models: [smollm2-135m]
frontier: {gpus: [1, 4], gpu_gib: [2], methods: [smt, full], most_layers: 10}
headline: {models: [smollm2-135m], world_sizes: [1, 2], stages: [2], length: 256}
"""


def test_the_shipped_study_asks_for_what_docs_promise() -> None:
    config = load_study(SHIPPED)
    assert (config.world_sizes[0], config.world_sizes[-1]) == (1, 1024)
    assert (config.lengths[0], config.lengths[-1]) == (512, 131072)
    assert (config.budgets[0], config.budgets[-1]) == (0.001, 0.1)
    assert set(config.stages) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("metods: [smt]", "unknown key metods in .*: did you mean methods"),
        ("base: {wrold_size: 2}", "unknown key base.wrold_size in .*: did you mean base.world_size"),
        ("methods: [smt, sft]", "methods.1 is 'sft': it may be .*did you mean smt"),
        ("lengths: []", "lengths is empty"),
        ("world_sizes: [1, 1]", r"world_sizes is \[1, 1\]: give each once"),
        ("micro_batches: [0]", "micro_batches has 0"),
        ("base: {length: long}", "base.length is 'long': expected an integer"),
        ("headline: {claimed: 67}", "headline.claimed is 67"),
        ("budgets: [2]", "budgets has 2"),
        ("simulate: {workers: 0}", "simulate.workers is 0"),
    ],
)
def test_wrong_configs_are_named(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=named):
        load_study(path)


def test_no_file_is_written_into_without_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.md"
    text.write_text("# Text\n")
    out = tmp_path / "out"
    arguments = ["--config", str(SHIPPED), "--out", str(out), "--markdown-into", str(text)]
    assert memory_study.main(arguments) == 2
    assert study_report.BEGIN in capsys.readouterr().err
    assert text.read_text() == "# Text\n"
    assert not out.exists()
    assert memory_study.main(["--config", str(SHIPPED), "nonsense"]) == 2


def test_a_study_writes_table_pictures_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, text, out = tmp_path / "study.yaml", tmp_path / "memory.md", tmp_path / "out"
    config.write_text(TINY)
    text.write_text(f"# By hand\n\n{study_report.BEGIN}\nan earlier study\n{study_report.END}\n\nAfter.\n")
    arguments = ["--config", str(config), "--out", str(out), "--markdown-into", str(text)]
    assert memory_study.main(arguments) == 0, capsys.readouterr().err
    frame = pandas.read_csv(out / "table.csv")
    pandas.testing.assert_frame_equal(pandas.read_parquet(out / "table.parquet"), frame, check_dtype=False)
    assert set(frame["curve"]) == {"world_size", "length", "micro_batch", "budget", "model", "headline", "frontier"}
    smt = frame[(frame["curve"] == "world_size") & (frame["method"] == "smt")]
    sharded = smt[smt["stage"] == 3].set_index("world_size")["peak_bytes"]
    assert sharded[8] < sharded[1]
    lengths = frame[(frame["curve"] == "length") & (frame["method"] == "smt")]
    kept = lengths[~lengths["gradient_checkpointing"]].set_index("length")["peak_bytes"]
    recomputed = lengths[lengths["gradient_checkpointing"]].set_index("length")["peak_bytes"]
    assert (recomputed <= kept).all()
    assert kept[1024] > kept[256]
    budgets = frame[(frame["curve"] == "budget") & (frame["method"] == "smt")].set_index("budget")
    # A budget is what is trained, to a block.
    for budget, row in budgets.iterrows():
        assert row["trained"] == pytest.approx(budget * row["parameters"], rel=0.02)
    largest = frame[frame["curve"] == "frontier"].set_index(["method", "world_size"])["parameters"]
    assert largest["smt", 1] > largest.get(("full", 1), 0)
    # Each reduction follows from two rows.
    headline = study_report.of_curve(frame.to_dict("records"), "headline")
    for found in study_report.reductions(headline):
        assert found["reduction"] == 1 - found["smt_bytes"] / found["full_bytes"]
        assert 0.2 < found["reduction"] < 0.95
    written = text.read_text()
    assert written.startswith("# By hand\n\n")
    assert written.endswith(f"{study_report.END}\n\nAfter.\n")
    assert "an earlier study" not in written
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", written)
    assert len(pictures) == 7
    for picture in pictures:
        assert 1000 < (tmp_path / picture).stat().st_size < 100_000
    assert (out / "report.md").read_text().count("![") == 7
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 7
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.slow
def test_chosen_points_are_simulated(tmp_path: Path) -> None:
    config, out = tmp_path / "study.yaml", tmp_path / "out"
    config.write_text(TINY + "simulate: {methods: [smt], world_sizes: [8], headline_world_sizes: [2]}\n")
    assert memory_study.main(["--config", str(config), "--out", str(out)]) == 0
    frame = pandas.read_csv(out / "table.csv")
    known = frame[frame["simulated_peak_bytes"].notna()]
    assert {*zip(known["curve"], known["method"], strict=True)} == {
        ("world_size", "smt"), ("headline", "smt"), ("headline", "full"),
    }  # fmt: skip
    assert (known["peak_bytes"] / known["simulated_peak_bytes"] - 1).abs().max() < 0.1
    assert known["simulated_calibration_bytes"].notna().any()
    assert "were simulated" in (out / "report.md").read_text()
