"""Does the page of results say what the stored numbers of studies and benchmarks say, and nothing else?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launcher.plots import DARK, LIGHT, to_png
from scripts import bench_loss, bench_step
from scripts import results as results_script
from scripts.benchmarks.ratios import paired
from scripts.benchmarks.results import BenchmarkResult, Chart, command_of, read_benchmark
from scripts.benchmarks.tables import Table
from scripts.ntk.study_config import SubsetsConfig
from scripts.ntk.subsets import named_subsets
from scripts.report.page import markdown as page_of
from scripts.report.source import read_source, shipped_studies, stored
from tests.scripts.study_examples import STUDIES, example_results

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_page_of_the_documents_is_what_the_stored_results_give() -> None:
    assert (DOCS / "results.md").read_text(encoding="utf-8") == page_of(stored(DOCS / "results"))
    for study in stored(DOCS / "results"):
        for name in study.pictures():
            assert (DOCS / "pictures" / f"{name}.png").is_file()
        # Numbers alone: no prediction, no text.
        assert "predictions" not in json.dumps(study.content)


def test_results_are_taken_in_and_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "plateau"
    run.mkdir()
    (run / "results.json").write_text(json.dumps(example_results("plateau")))
    html = tmp_path / "page.html"
    arguments = ["--docs", str(tmp_path / "docs"), "--html", str(html)]
    assert results_script.main([str(run), *arguments]) == 0
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "## plateau" in text
    assert "- `plateau`:" not in text
    assert "- `scores`:" in text
    assert (tmp_path / "docs" / "pictures" / "plateau-share.png").stat().st_size < 150_000
    assert "data:image/png;base64" in html.read_text()
    shutil.rmtree(run)
    assert results_script.main(["--check", *arguments]) == 0
    (tmp_path / "docs" / "results.md").write_text("other")
    assert results_script.main(["--check", *arguments]) == 2
    assert "write it anew" in capsys.readouterr().err


def test_what_is_no_study_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("{}")
    for place in ("a.json", "missing"):
        assert results_script.main([str(tmp_path / place), "--docs", str(tmp_path)]) == 2
    assert "no result of a study" in capsys.readouterr().err
    assert results_script.main(["--check", str(tmp_path / "a.json"), "--docs", str(tmp_path)]) == 2
    assert "--check takes in nothing" in capsys.readouterr().err


def test_every_shipped_study_is_on_the_page() -> None:
    assert set(shipped_studies()) == {*(path.stem for path in STUDIES), "ntk"}


def test_kernel_studies_have_a_table_and_pictures(tmp_path: Path) -> None:
    config = SubsetsConfig(per_matrix=(1,), kinds=("row", "column", "block"), scores=("first",), lora_ranks=(1,))
    kinds = {named.kind for named in named_subsets(config)} - {"full", "matrices", "vectors"}
    line = {
        "head": None, "shots": 16, "subset": "rows-1-first", "kind": "rows", "budget": 1, "score": "first",
        "num_seeds": 3, "fraction": 0.001, "num_parameters": 1000,
    }  # fmt: skip
    for name in ("scaled_distance", "centred_alignment", "accuracy", "agreement"):
        line |= {name: 0.25, f"{name}_deviation": 0.01}
    model = {"name_or_path": "/secret/minilm", "function": "probe"}
    content = {"config": {"model": model, "heads": ["fitted"], "shots": [16]}, "machine": example_results()["machine"]}
    others = [{**line, "kind": kind, "subset": kind, "fraction": 0.01} for kind in sorted(kinds)]
    (tmp_path / "results.json").write_text(json.dumps({**content, "summary": [line, *others], "rows": []}))
    found = read_source(tmp_path)
    assert "secret" not in json.dumps(found.content)
    text = page_of([found])
    # What was changed is in the command, and no more.
    command = "ntk.yaml --model.name_or_path=.../minilm '--heads=[\"fitted\"]'`"
    assert command in text
    # Every kind that the study makes has its line.
    (axes,) = found.pictures()["ntk-distance"][1](LIGHT).axes
    labels = axes.get_legend_handles_labels()[1]
    assert {label.partition(",")[0] for label in labels} == kinds == {"rows", "columns", "blocks", "lora"}
    assert "| rows-1-first | 1,000 | 0.10% | 0.250 ± 0.010 | 0.250 ± 0.010 | 25.0 ± 1.0 % | 25.0 % |" in text
    for _, draw in found.pictures().values():
        assert to_png(draw(LIGHT)).startswith(b"\x89PNG")


def _result() -> BenchmarkResult:
    seconds = {"floor": [1.0] * 6, "floor2": [1.0, 1.01] * 3, "rows": [1.02] * 6}
    ratios = {name: paired(each, seconds["floor"]) for name, each in seconds.items()}
    return BenchmarkResult(
        question="What does a step cost?",
        command="python scripts/bench_step.py --steps 6",
        settings={"steps": 6},
        machine={"cpu": "a processor", "cores": "2", "python": "3.11", "torch": "2.13", "machine": "x86_64"},
        tables=[Table("Steps", ("method", "kind", "time"), [["rows,\nfirst", "row", "1.0"]], num_words=2)],
        remarks=("small_blocks trains more",),
        chart=Chart("bars", "One step", {"ratios": _plain(ratios), "groups": {"ours": ["rows"]}, "floor": "floor"}),
        numbers={"step_seconds": seconds},
    )


def _plain(ratios: object) -> object:
    return json.loads(json.dumps(ratios, default=vars))


def test_a_benchmark_is_read_as_it_was_written() -> None:
    content = _result().content()
    assert content == json.loads(json.dumps(content)), "nothing that JSON changes"
    assert read_benchmark(content).content() == content
    assert content["step_seconds"]["rows"] == [1.02] * 6, "the numbers stand beside the rest"


def test_a_benchmark_has_a_section_with_its_picture(tmp_path: Path) -> None:
    (tmp_path / "top-half.json").write_text(json.dumps(_result().content()))
    arguments = ["--docs", str(tmp_path / "docs"), "--html", str(tmp_path / "page.html")]
    assert results_script.main([str(tmp_path / "top-half.json"), *arguments]) == 0
    assert (tmp_path / "docs" / "results" / "bench-top-half.json").is_file()
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "## bench-top-half\n\nWhat does a step cost?\n\nSmall_blocks trains more.\n\n### Steps" in text
    assert "|---|---|---:|\n| rows, first | row | 1.0 |" in text
    assert "![One step](pictures/bench-top-half.png)" in text
    assert "`python scripts/bench_step.py --steps 6`; a processor, 2 cores, Python 3.11, torch 2.13." in text
    assert (tmp_path / "docs" / "pictures" / "bench-top-half.png").is_file()
    assert "bench-top-half" in (tmp_path / "page.html").read_text()
    # Taken in again from where it is stored, it keeps its name.
    (source,) = stored(tmp_path / "docs" / "results")
    assert source.name == "bench-top-half"
    ((_, draw),) = source.pictures().values()
    assert to_png(draw(LIGHT)) != to_png(draw(DARK))


def test_what_a_benchmark_writes_can_be_taken_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "loss.json"
    assert bench_loss.main(["--small", "--json", str(out)]) == 0
    source = read_source(out)
    assert source.name == "bench-loss"
    assert source.question() == (bench_loss.__doc__ or "").splitlines()[0]
    assert source.made().startswith("`python scripts/bench_loss.py --small`; ")
    (table,) = source.tables()
    assert [row[0] for row in table.rows] == [row["loss"] for row in source.content["losses"]]
    assert all(row[0] in capsys.readouterr().out for row in table.rows[:1])
    assert source.pictures() == {}


@pytest.mark.slow
def test_a_step_brings_its_picture(tmp_path: Path) -> None:
    out, plot = tmp_path / "step.json", tmp_path / "step.png"
    flags = ["--small", "--no-memory", "--methods", "floor,floor2,rows", f"--json={out}", "--plot", str(plot)]
    assert bench_step.main(flags) == 0
    source = read_source(out)
    ((_, draw),) = source.pictures().values()
    assert to_png(draw(LIGHT)) == plot.read_bytes()
    assert source.made().startswith("`python scripts/bench_step.py --small --no-memory --methods floor,floor2,rows`; ")


def test_a_command_says_nothing_of_where_it_was_given() -> None:
    told = command_of("/somewhere/scripts/bench_adapters.py", ["--model", "/data/llama", "--json=a.json", "--rounds=2"])
    assert told == "python scripts/bench_adapters.py --model .../llama --rounds=2"
    assert command_of("bench_step.py", ["--plot", "../a.png", "--folder=../b c"]) == (
        "python scripts/bench_step.py '--folder=.../b c'"
    )
