"""How do the results of all studies become one page of Markdown and one of HTML? Nothing is said that no file holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import parse_as
from launcher.page import note, picture, section, table, write_page
from launcher.plots import WIDTH_INCHES, Theme, new_figure, style, title
from launcher.yaml_files import read_mapping
from scripts.accuracy.commands import override
from scripts.accuracy.study_plots import Drawing, drawings, log_ticks
from scripts.accuracy.study_results import FORMAT
from scripts.accuracy.study_tables import made_on, protocol_text, tables_of
from scripts.benchmarks.tables import Table
from scripts.ntk.study_config import StudyConfig as NtkConfig
from sparse_zero.errors import InputError
from sparse_zero.files import read_json, to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NTK_FORMAT, NTK = "sparse_zero.ntk_study", "ntk"
RESULTS_FILE = "results.json"
_CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "studies"
# What an aggregated line of a kernel study has besides its measures.
_NTK_HEAD = ("subset", "parameters", "share", "scaled distance", "CKA", "accuracy", "agreement")
# The order of the page: what comes first here stands first, the others after them.
_ORDER = ("plateau", "words", "commonsense", "text", NTK)
# By the kinds of scripts/ntk/subsets.py that have budgets.
_COLOURS = {"rows": "#0072b2", "columns": "#009e73", "blocks": "#cc79a7", "lora": "#d55e00"}


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """The stored numbers of one study."""

    name: str
    content: Mapping[str, Any]

    @property
    def is_ntk(self) -> bool:
        """Whether it is a study of kernels."""
        return self.content["format"] == NTK_FORMAT


def read_study_results(place: Path) -> StudyResults:
    """The numbers of a study, from its folder or JSON; of a study of kernels, their means.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = place / RESULTS_FILE if place.is_dir() else place
    if not path.is_file():
        raise InputError(f"{place} has no {RESULTS_FILE}: name the folder of a study that was run, or a JSON of it")
    content = read_json(path, strict=True)
    if not isinstance(content, dict):
        raise InputError(f"{path} is no result of a study: run the study again")
    if content.get("format") in (FORMAT, NTK_FORMAT):
        return StudyResults(name=str(content["name"]), content=content)
    if isinstance(content.get("summary"), list) and isinstance(content.get("machine"), dict):
        kept = {"format": NTK_FORMAT, "name": NTK, "machine": content["machine"], "summary": content["summary"]}
        return StudyResults(name=NTK, content={**kept, "command": _ntk_command(content.get("config"))})
    raise InputError(f"{path} is no result of a study: name one of scripts/accuracy_study.py or scripts/ntk_study.py")


def _ntk_command(config: Any) -> str:
    """What makes a study of kernels anew: all that its config has otherwise than the shipped one."""
    shipped = read_mapping(_CONFIGS / f"{NTK}.yaml")
    # Settings that the shipped file leaves out have their defaults.
    usual = _flat(json.loads(to_json(asdict(parse_as(NtkConfig, shipped, NTK)))))
    own = _flat(config) if isinstance(config, dict) else {}
    words = [override(f"--{key}", each) for key, each in own.items() if key in usual and each != usual[key]]
    return " ".join([f"python scripts/ntk_study.py --config configs/studies/{NTK}.yaml", *words])


def _flat(mapping: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """By dotted keys."""
    found: dict[str, Any] = {}
    for key, each in mapping.items():
        found |= _flat(each, f"{place}{key}.") if isinstance(each, dict) else {f"{place}{key}": each}
    return found


def stored(folder: Path) -> list[StudyResults]:
    """What lies in a folder of results, in the order of the page."""
    found = [read_study_results(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda each: (_ORDER.index(each.name) if each.name in _ORDER else len(_ORDER), each.name))


def shipped_studies() -> dict[str, str]:
    """The question of every study that has a config here, by its name."""
    found = {}
    for path in sorted(_CONFIGS.glob("*.yaml")):
        content = read_mapping(path)
        if isinstance(content.get("study"), dict):
            found[path.stem] = str(content["study"]["question"])
    return {**found, NTK: "How near is the kernel of few parameters to that of all?"}


def _tables(study: StudyResults) -> list[Table]:
    return _ntk_tables(study.content) if study.is_ntk else tables_of(study.content)


def _ntk_tables(content: Mapping[str, Any]) -> list[Table]:
    """The nearest to the kernel of all parameters first; one table for each head and number of shots."""
    tables = []
    for head, shots in dict.fromkeys((line["head"], line["shots"]) for line in content["summary"]):
        own = [line for line in content["summary"] if (line["head"], line["shots"]) == (head, shots)]
        named = f"{f'{head} head, ' if head else ''}{shots} training samples a class"
        ordered = sorted(own, key=lambda line: float(line["scaled_distance"]))
        tables.append(Table(f"kernels: {named}", _NTK_HEAD, [_ntk_cells(line) for line in ordered]))
    return tables


def _ntk_cells(line: Mapping[str, Any]) -> list[str]:
    def both(name: str, scale: float = 1.0, digits: int = 3) -> str:
        return f"{scale * line[name]:.{digits}f} ± {scale * line[f'{name}_deviation']:.{digits}f}"

    return [
        str(line["subset"]),
        f"{line['num_parameters']:,}",
        f"{line['fraction']:.2%}",
        both("scaled_distance"),
        both("centred_alignment"),
        f"{both('accuracy', 100, 1)} %",
        f"{100 * line['agreement']:.1f} %",
    ]


def _ntk_figure(content: Mapping[str, Any], measure: str, label: str, theme: Theme) -> Figure:
    """A measure against the number of parameters, a line for each kind and score; of the first head and shots."""
    first = content["summary"][0]
    lines = [line for line in content["summary"] if (line["head"], line["shots"]) == (first["head"], first["shots"])]
    figure = new_figure(WIDTH_INCHES, 4.6, theme)
    axes = figure.subplots()
    style(axes, theme)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    shares = [100 * line["fraction"] for line in lines if line["kind"] in _COLOURS]
    if len(set(shares)) > 1:
        log_ticks(axes, shares, lambda value: f"{value:.2g}")
    styles: dict[str, Any] = {}
    for kind, score in dict.fromkeys((line["kind"], line["score"]) for line in lines if line["kind"] in _COLOURS):
        own = sorted(
            (line for line in lines if (line["kind"], line["score"]) == (kind, score)),
            key=lambda line: float(line["fraction"]),
        )
        dashes = styles.setdefault(str(score), ["-", (0, (4, 2)), (0, (1, 1.5))][len(styles) % 3])
        axes.errorbar(
            [100 * line["fraction"] for line in own],
            [line[measure] for line in own],
            yerr=[line[f"{measure}_deviation"] for line in own],
            color=_COLOURS[kind], linestyle=dashes, marker="o", markersize=4.5, capsize=3, linewidth=1.6,
            label=kind if score in (None, "") else f"{kind}, {score}",
        )  # fmt: skip
    axes.set_xlabel("share of the parameters, %")
    axes.set_ylabel(label)
    title(axes, f"Kernels: {label}", theme)
    legend = figure.legend(loc="outside lower left", ncols=3, fontsize=9, frameon=False)
    for text in legend.get_texts():
        text.set_color(theme.ink)
    return figure


def study_pictures(study: StudyResults) -> dict[str, tuple[str, Drawing]]:
    """What a study's pictures show and how they are drawn, by the names of their files."""
    if not study.is_ntk:
        return {f"{study.name}-{name}": each for name, each in drawings(study.content).items()}

    def drawing(measure: str, label: str) -> Drawing:
        return lambda theme: _ntk_figure(study.content, measure, label, theme)

    return {
        f"{NTK}-distance": (
            "Distance to the kernel of all parameters",
            drawing("scaled_distance", "scaled distance to the full kernel"),
        ),
        f"{NTK}-accuracy": (
            "Accuracy of regression with the kernel",
            drawing("accuracy", "accuracy of kernel regression"),
        ),
    }


def pictures(studies: Sequence[StudyResults]) -> dict[str, tuple[str, Drawing]]:
    """Of all studies."""
    return {name: each for study in studies for name, each in study_pictures(study).items()}


def _question(study: StudyResults) -> str:
    questions = shipped_studies()
    return str(study.content.get("question") or questions.get(study.name, study.name))


def _words(study: StudyResults) -> str:
    if not study.is_ntk:
        return protocol_text(study.content)
    seeds = sorted({line["num_seeds"] for line in study.content["summary"]})
    return (
        f"Mean ± standard deviation over {' or '.join(map(str, seeds))} seeds, the nearest to the kernel of all "
        "parameters first. The scaled distance is the least of |c K - K_full| / |K_full| over c; CKA is the cosine of "
        "the centred kernels; accuracy and agreement with the full kernel's predictions are of kernel ridge regression."
    )


def _made(study: StudyResults) -> str:
    if not study.is_ntk:
        return f"`{study.content['command']}`; {made_on(study.content)}"
    machine = study.content["machine"]
    told = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, torch {machine['torch']}"
    return f"`{study.content['command']}`; {told}"


def _not_run(studies: Sequence[StudyResults]) -> list[tuple[str, str]]:
    known = {study.name for study in studies}
    return [(name, question) for name, question in shipped_studies().items() if name not in known]


def markdown(studies: Sequence[StudyResults]) -> str:
    """The page for the documents; pictures stand beside it in ``pictures/``."""
    lines = [
        "# Results",
        "",
        "<!-- made by `python scripts/results.py` from docs/results/: change nothing here -->",
        "",
        "Every number here is from the JSON of a study in `docs/results/`, and nothing else is claimed. Beside each",
        "study stand its command, the machine and the versions; [studies](studies.md) says how they are run and read.",
        "",
    ]
    for study in studies:
        lines += [f"## {study.name}", "", _question(study), "", *_words(study).split("\n"), ""]
        for each in _tables(study):
            lines += ["#" + each.markdown()]
        for name, (what, _) in study_pictures(study).items():
            lines += [f"![{what}](pictures/{name}.png)", ""]
        lines += [f"{_made(study)}.", ""]
    left = _not_run(studies)
    if left:
        lines += ["## Not run", "", "These studies have a config in `configs/studies/`, and no result here:", ""]
        lines += [f"- `{name}`: {question}" for name, question in left] + [""]
    return "\n".join(lines).rstrip("\n") + "\n"


def write_html(path: Path, studies: Sequence[StudyResults]) -> None:
    """The same as one page with nothing beside it."""
    sections = []
    for study in studies:
        body = f"<p>{escape(_question(study))}</p>"
        for each in _tables(study):
            body += f"<h3>{escape(each.title)}</h3>{table(each.rows, head=each.headings)}"
        body += "".join(picture(what, draw)[0] for what, draw in study_pictures(study).values())
        body += "".join(note(text) for text in (*_words(study).split("\n\n"), _made(study)))
        sections.append(section(study.name, body, identifier=study.name))
    left = _not_run(studies)
    if left:
        sections.append(section("Not run", table(left, head=("study", "question")), identifier="not-run"))
    write_page(path, "Results of the studies", sections)
