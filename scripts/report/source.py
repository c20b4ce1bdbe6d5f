"""What has a place on the page of results, and where is it stored?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from launcher.yaml_files import read_mapping
from scripts.accuracy.study_plots import Drawing
from scripts.accuracy.study_results import FORMAT as ACCURACY_FORMAT
from scripts.benchmarks.results import FORMAT as BENCHMARK_FORMAT
from scripts.benchmarks.tables import Table
from scripts.report.accuracy_study import AccuracyStudy
from scripts.report.benchmark import Benchmark
from scripts.report.kernel_study import NTK, NTK_FORMAT, KernelStudy, means_of
from sparse_zero.errors import InputError
from sparse_zero.files import read_json

RESULTS_FILE = "results.json"
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "studies"
# The order of the page: what comes first here stands first, the others after them, and then the benchmarks.
_ORDER = ("plateau", "words", "commonsense", "text", NTK)


class Source(Protocol):
    """The stored numbers of one study or benchmark, and what is told of them."""

    @property
    def name(self) -> str:
        """Of its section, its file and its pictures."""

    @property
    def content(self) -> Mapping[str, Any]:
        """The JSON."""

    def question(self) -> str:
        """What it asks; empty where its numbers do not say."""

    def words(self) -> str:
        """How it was done, and what to know of it: paragraphs."""

    def tables(self) -> list[Table]:
        """All numbers that are told."""

    def pictures(self) -> dict[str, tuple[str, Drawing]]:
        """What its pictures show and how they are drawn, by the names of their files."""

    def made(self) -> str:
        """The command that makes it anew, and on what it was made."""


def read_source(place: Path) -> Source:
    """The numbers of a study or a benchmark, from a folder or a JSON; of a study of kernels, their means.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = place / RESULTS_FILE if place.is_dir() else place
    if not path.is_file():
        raise InputError(f"{place} has no {RESULTS_FILE}: name the folder of a study that was run, or a JSON of it")
    content = read_json(path, strict=True)
    if not isinstance(content, dict):
        raise InputError(f"{path} is no result of a study: run the study again")
    kind = content.get("format")
    if kind == ACCURACY_FORMAT:
        return AccuracyStudy(name=str(content["name"]), content=content)
    if kind == NTK_FORMAT:
        return KernelStudy(name=NTK, content=content)
    if kind == BENCHMARK_FORMAT:
        return Benchmark(name=f"bench-{path.stem.removeprefix('bench-')}", content=content)
    if isinstance(content.get("summary"), list) and isinstance(content.get("machine"), dict):
        return KernelStudy(name=NTK, content=means_of(content, CONFIGS))
    raise InputError(
        f"{path} is no result of a study: name one of scripts/accuracy_study.py or scripts/ntk_study.py, or what "
        "--json of a benchmark wrote"
    )


def stored(folder: Path) -> list[Source]:
    """What lies in a folder of results, in the order of the page."""
    found = [read_source(path) for path in sorted(folder.glob("*.json"))]

    def place(each: Source) -> tuple[bool, int, str]:
        return isinstance(each, Benchmark), _ORDER.index(each.name) if each.name in _ORDER else len(_ORDER), each.name

    return sorted(found, key=place)


def shipped_studies() -> dict[str, str]:
    """The question of every study that has a config here, by its name."""
    found = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        content = read_mapping(path)
        if isinstance(content.get("study"), dict):
            found[path.stem] = str(content["study"]["question"])
    return {**found, NTK: "How near is the kernel of few parameters to that of all?"}
