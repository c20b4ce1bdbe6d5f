"""Does the report show a run, whole and alone, however little of it there is?"""

import base64
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher import plots
from launcher.report import _tiles, flatten, write_report
from launcher.selection_map import locate_weight, selection_figure, selection_grid
from sparse_zero.errors import InputError
from tests.launcher.synthetic_run import selection, summary, train_rows, validation_rows, write_run

pytest.importorskip("matplotlib")

VOID = {"meta", "img", "source", "br", "link"}


class Page(HTMLParser):
    """Checks that elements nest, and collects attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "maths & more")
    assert write_report(folder) == folder / "report" / "report.html"
    return folder


def _copy(run: Path, target: Path) -> Path:
    shutil.copytree(run, target)
    shutil.rmtree(target / "report")
    return target


def test_the_page_needs_nothing_but_itself(finished: Path) -> None:
    html = (finished / "report" / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not [tag for tag, _, _ in page.attributes if tag in ("script", "link", "iframe", "object")]
    links = [value for _, name, value in page.attributes if name in ("src", "srcset", "href")]
    assert len(links) == 10, "five pictures, light and dark"
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"https?://|url\(|@import", html)
    for link in links:
        assert base64.b64decode(link.split(",")[1], validate=True).startswith(b"\x89PNG")


def test_the_pictures_lie_beside_the_page(finished: Path) -> None:
    html = (finished / "report" / "report.html").read_text(encoding="utf-8")
    names = {path.stem for path in (finished / "report").glob("*.png")}
    assert names == {"loss", "learning_rate", "gradient_norm", "throughput", "selection"}
    for path in (finished / "report").glob("*.png"):
        assert base64.b64encode(path.read_bytes()).decode() in html
    assert {path.name for path in (finished / "report").iterdir()} == {
        "report.html",
        *(f"{name}.png" for name in names),
    }


def test_the_page_shows_numbers_config_and_events(finished: Path) -> None:
    text = "\n".join(Page((finished / "report" / "report.html").read_text(encoding="utf-8")).texts)
    for part in (
        "maths & more", "1,376,256 of 134,515,008  (1.02 %)", "selection", "regions[0].modules", "*.self_attn.{q,k,v}_proj",
        "regions[1].per_matrix", "0.003", "started on 2 ranks", "2 steps were skipped", selection().digest(),
    ):  # fmt: skip
        assert part in text, part


def test_predictions_are_sorted_by_what_changed_and_escaped(finished: Path) -> None:
    html = (finished / "report" / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in html
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; I think it&#x27;s 7 &amp; more" in html
    assert "gives &lt;b&gt;" in html
    # base FFTFTF, tuned TFFTTT: problems 0, 3, 5 became right, 2 became wrong, 1 stayed wrong, 4 stayed right.
    shown = re.findall(r"<h3>([^<]*(?:before|after)[^<]*)</h3>|problem (\d+)<", html)
    assert [name or int(index) for name, index in shown] == [
        "Wrong before, right after", 0, 3, 5, "Right before, wrong after", 2, "Wrong before and after", 1,
        "Right before and after", 4,
    ]  # fmt: skip


def test_writing_again_gives_the_same_bytes(finished: Path) -> None:
    page = finished / "report" / "report.html"
    before = page.read_bytes()
    write_report(finished)
    assert page.read_bytes() == before


@pytest.mark.parametrize("left", ["config.yaml", "metrics.jsonl"])
def test_a_run_that_has_just_begun_has_a_report(finished: Path, tmp_path: Path, left: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished / left, folder / left)
    text = "\n".join(Page(write_report(folder).read_text(encoding="utf-8")).texts)
    assert "there is no summary yet" in text
    assert ("has not trained yet" in text) == (left == "config.yaml")


def test_predictions_from_one_side_only_are_no_comparison(finished: Path, tmp_path: Path) -> None:
    folder = _copy(finished, tmp_path / "run")
    (folder / "evaluation" / "tuned.json").unlink()
    assert "nothing to compare" in write_report(folder).read_text(encoding="utf-8")


def _write(name: str, data: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (
            lambda folder: [(folder / name).unlink() for name in ("config.yaml", "metrics.jsonl")],
            "is no run folder",
        ),
        (_write("config.yaml", b"a: [1"), "config.yaml is no readable YAML"),
        (_write("config.yaml", b"just words"), "config.yaml holds no sections"),
        (_write("metrics.jsonl", b"{\n{}\n"), "metrics.jsonl line 1"),
        (_write("summary.json", b"{"), "summary.json is no valid JSON"),
        (_write("summary.json", b"3"), "summary.json holds a int"),
        (_write("selection.safetensors", b"cut"), "selection.safetensors"),
        (_write("evaluation/base.json", b"{}"), "base.json holds no list of predictions"),
    ],
)
def test_a_damaged_run_folder_is_named_in_one_line(
    finished: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = _copy(finished, tmp_path / "run")
    damage(folder)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "report").exists(), "nothing is written"


@pytest.mark.parametrize(
    "damage",
    [
        {"accuracy": [1]},
        {"accuracy": {"base": "a", "tuned": "b", "num_problems": "c"}},
        {"parameters": {"total": "12", "trained": 3}},
        {"parameters": {"total": 12, "trained": [3]}},
        {"parameters": 5},
        {"forgetting": {"base": "low", "tuned": None, "num_tokens": []}},
        {"peak_memory_bytes_per_rank": 5},
        {"peak_memory_bytes_per_rank": [None, "x", True]},
        {"tokens_per_second": "fast", "adapter_bytes": "big", "merged_bytes": {}},
        {"phases": [1], "steps": "1", "world_size": {}, "final_loss": "low"},
        {"phases": {"train": "long"}, "resumed_after_step": [2]},
    ],
    ids=str,
)
def test_damaged_values_of_the_summary_are_left_out(finished: Path, tmp_path: Path, damage: dict[str, Any]) -> None:
    folder = _copy(finished, tmp_path / "run")
    (folder / "summary.json").write_text(json.dumps(summary() | damage))
    tiles = _tiles(summary() | damage)
    assert "–" not in tiles.replace("before: –", "")
    assert tiles.count("<b>") == 6 - len(
        {"accuracy", "forgetting", "parameters", "peak_memory_bytes_per_rank", "tokens_per_second", "adapter_bytes"}
        & set(damage)
    )
    text = "\n".join(Page(write_report(folder).read_text(encoding="utf-8")).texts)
    assert "Last training loss" in text


def test_flatten_keeps_order_and_kinds() -> None:
    config = {"a": {"b": None, "c": [1, 2], "d": []}, "e": [{"f": True}, {"f": 0.1}], "g": {}}
    assert flatten(config) == [
        ("a.b", "–"), ("a.c", "1, 2"), ("a.d", "(empty)"), ("e[0].f", "true"), ("e[1].f", "0.1"), ("g", "{}"),
    ]  # fmt: skip


# -- pictures


def _pixels(png: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return np.asarray(imread(io.BytesIO(png), format="png"))


@pytest.mark.parametrize(
    ("rows", "theme"),
    [
        ([], plots.LIGHT),
        (train_rows(1), plots.LIGHT),
        (train_rows(7), plots.DARK),
        (train_rows(150, skipped=(1, 80, 150)), plots.LIGHT),
        (train_rows(3, skipped=(1, 2, 3)), plots.DARK),
    ],
    ids=["none", "one", "seven", "gaps", "all skipped"],
)
def test_every_picture_draws_however_few_the_rows(rows: list[dict[str, object]], theme: plots.Theme) -> None:
    for draw in (
        plots.loss_figure,
        plots.learning_rate_figure,
        plots.gradient_norm_figure,
        plots.throughput_figure,
    ):
        pixels = _pixels(plots.to_png(draw(rows, theme=theme)))
        assert pixels.shape[1] == 1152
        background = tuple(int(theme.background[i : i + 2], 16) / 255 for i in (1, 3, 5))
        np.testing.assert_allclose(pixels[0, 0, :3], background, atol=0.01)
        assert np.ptp(pixels[..., :3], axis=(0, 1)).max() > 0.5, "something is drawn"


def test_the_loss_has_both_curves_and_gaps_where_skipped() -> None:
    axes: Any = plots.loss_figure(train_rows(skipped=(40, 41)), validation_rows()).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training, each step", "mean of 7 points", "validation", "skipped, not finite (2)"]
    raw, mean, validation, _ = axes.get_lines()
    assert [step for step, loss in zip(raw.get_xdata(), raw.get_ydata(), strict=True) if math.isnan(loss)] == [40, 41]
    assert np.isnan(mean.get_ydata()).sum() == 2
    assert list(validation.get_xdata()) == [30, 60, 90, 120, 150]
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_ylabel() == "loss (nats per response token)"


def test_operations_are_shown_as_a_share_where_the_peak_is_known() -> None:
    rows = train_rows(20)
    axes: Any = plots.throughput_figure(rows).axes[1]
    assert axes.get_ylabel() == "GFLOP/s"
    assert list(axes.get_lines()[0].get_ydata()) == [row["flops_per_second"] / 1e9 for row in rows]
    axes = plots.throughput_figure([{**row, "mfu": 0.4} for row in rows]).axes[1]
    assert axes.get_ylabel() == "%"
    assert list(axes.get_lines()[0].get_ydata()) == pytest.approx([40.0] * 20)


def test_a_repeated_step_counts_once() -> None:
    rows = [{"kind": "train", "step": step, "loss": loss} for step, loss in ((1, 5.0), (2, 4.0), (2, 3.0), (3, 2.0))]
    line: Any = plots.loss_figure(rows).axes[0].get_lines()[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2, 3], [5.0, 3.0, 2.0])


def test_norms_over_magnitudes_get_a_logarithmic_axis() -> None:
    rows = [{"kind": "train", "step": step, "gradient_norm": 10.0 ** (3 - step)} for step in range(1, 6)]
    assert plots.gradient_norm_figure(rows).axes[0].get_yscale() == "log"
    assert plots.gradient_norm_figure(train_rows()).axes[0].get_yscale() == "linear"


def test_running_mean_leaves_gaps_out() -> None:
    means = plots.running_mean([1.0, 2.0, math.nan, 4.0, 9.0], 3)
    assert means == pytest.approx([1.5, 1.5, math.nan, 6.5, 6.5], nan_ok=True)


def test_pictures_leave_matplotlib_as_it_was() -> None:
    import matplotlib

    before = (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False))
    plots.to_png(plots.loss_figure(train_rows(), validation_rows()))
    assert (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)) == before


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ("self_attn.q_proj", 3)),
        ("model.layers.11.mlp.experts.7.up_proj.weight", ("mlp.experts.*.up_proj", 11)),
        ("lm_head.weight", ("lm_head", None)),
        ("0.weight", ("0", 0)),
        ("layers.2.weight", ("layers", 2)),
        ("0.bias", ("bias", 0)),
    ],
)
def test_weights_are_located(name: str, place: tuple[str, int | None]) -> None:
    assert locate_weight(name) == place


def test_the_grid_holds_every_parameter_once() -> None:
    chosen = selection()
    counts = {name: weight.num_parameters_by_kind() for name, weight in chosen.weights.items()}
    counts["lm_head.weight"] = {"row": 11}
    grid = selection_grid(counts, num_layers=32)
    assert grid.modules == (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "lm_head",
    )  # fmt: skip
    assert (grid.kinds, grid.num_layers, grid.has_outside) == (("block", "row", "column"), 32, True)
    assert sum(map(sum, grid.totals)) == chosen.num_parameters + 11
    for kind, total in chosen.num_parameters_by_kind().items():
        assert sum(map(sum, grid.counts[kind])) == total + (11 if kind == "row" else 0)
    assert grid.totals[2][20] == chosen.weights["model.layers.20.self_attn.v_proj.weight"].num_parameters
    assert grid.totals[-1][32] == 11
    assert [row[31] for row in grid.totals] == [0] * 7, "layers without a trained weight are shown, empty"


@pytest.mark.parametrize(
    ("num_layers", "kinds"),
    [(1, ("block", "row", "column")), (12, ("block",)), (30, ("row",)), (80, ("block", "row", "column"))],
)
def test_the_map_fits_any_model(num_layers: int, kinds: tuple[str, ...]) -> None:
    chosen = selection(num_layers, kinds)
    counts = {name: weight.num_parameters_by_kind() for name, weight in chosen.weights.items()}
    figure: Any = selection_figure(counts, num_layers)
    plots.to_png(figure)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert len(panels) == (1 if len(kinds) == 1 else 4)
    renderer = figure.canvas.get_renderer()
    for axes in panels:
        boxes = [text.get_window_extent(renderer) for text in axes.get_xticklabels() if text.get_text()]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes)), "labels do not overlap"
        boxes = [text.get_window_extent(renderer) for text in axes.get_yticklabels()]
        assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))


def test_an_empty_selection_says_so() -> None:
    assert [text.get_text() for text in selection_figure({}).axes[0].texts] == ["nothing selected"]


def test_report_reads_what_the_run_wrote(finished: Path) -> None:
    """The made-up run follows the run folder's contract: every training row has every field of it."""
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    fields = {
        "kind", "step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "flops_per_second",
        "response_tokens", "step_seconds",
        "forward_seconds", "backward_seconds", "update_seconds", "peak_memory_bytes", "epoch", "skipped",
    }  # fmt: skip
    assert all(set(row) == fields for row in rows if row["kind"] == "train")
