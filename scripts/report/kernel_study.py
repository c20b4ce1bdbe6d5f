"""What does the page of results tell of a study of neural tangent kernels?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import parse_as
from launcher.plots import WIDTH_INCHES, Theme, new_figure, style, title
from launcher.yaml_files import read_mapping
from scripts.accuracy.study_plots import Drawing, log_ticks
from scripts.benchmarks.tables import Table
from scripts.commands import override
from scripts.ntk.study_config import StudyConfig
from sparse_zero.files import to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NTK_FORMAT, NTK = "sparse_zero.ntk_study", "ntk"
# What an aggregated line has besides its measures.
_HEAD = ("subset", "parameters", "share", "scaled distance", "CKA", "accuracy", "agreement")
# By the kinds of scripts/ntk/subsets.py that have budgets.
_COLOURS = {"rows": "#0072b2", "columns": "#009e73", "blocks": "#cc79a7", "lora": "#d55e00"}


@dataclass(frozen=True, kw_only=True)
class KernelStudy:
    """See :class:`scripts.report.source.Source`."""

    name: str
    content: Mapping[str, Any]

    def question(self) -> str:
        """That of its config, which the page knows."""
        return ""

    def words(self) -> str:
        """What the measures are."""
        seeds = sorted({line["num_seeds"] for line in self.content["summary"]})
        return (
            f"Mean ± standard deviation over {' or '.join(map(str, seeds))} seeds, the nearest to the kernel of all "
            "parameters first. The scaled distance is the least of |c K - K_full| / |K_full| over c; CKA is the "
            "cosine of the centred kernels; accuracy and agreement with the full kernel's predictions are of kernel "
            "ridge regression."
        )

    def tables(self) -> list[Table]:
        """The nearest to the kernel of all parameters first; one for each head and number of shots."""
        tables = []
        summary = self.content["summary"]
        for head, shots in dict.fromkeys((line["head"], line["shots"]) for line in summary):
            own = [line for line in summary if (line["head"], line["shots"]) == (head, shots)]
            named = f"{f'{head} head, ' if head else ''}{shots} training samples a class"
            ordered = sorted(own, key=lambda line: float(line["scaled_distance"]))
            tables.append(Table(f"kernels: {named}", _HEAD, [_cells(line) for line in ordered]))
        return tables

    def pictures(self) -> dict[str, tuple[str, Drawing]]:
        """Distance and accuracy by budget."""

        def drawing(measure: str, label: str) -> Drawing:
            return lambda theme: _figure(self.content, measure, label, theme)

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

    def made(self) -> str:
        """Command and machine."""
        machine = self.content["machine"]
        told = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, torch {machine['torch']}"
        return f"`{self.content['command']}`; {told}"


def means_of(content: Mapping[str, Any], configs: Path) -> dict[str, Any]:
    """What is kept of the JSON of scripts/ntk_study.py; ``configs`` has the shipped ``ntk.yaml``."""
    kept = {"format": NTK_FORMAT, "name": NTK, "machine": content["machine"], "summary": content["summary"]}
    return {**kept, "command": _command(content.get("config"), configs)}


def _command(config: Any, configs: Path) -> str:
    """What makes a study of kernels anew: all that its config has otherwise than the shipped one."""
    shipped = read_mapping(configs / f"{NTK}.yaml")
    # Settings that the shipped file leaves out have their defaults.
    usual = _flat(json.loads(to_json(asdict(parse_as(StudyConfig, shipped, NTK)))))
    own = _flat(config) if isinstance(config, dict) else {}
    words = [override(f"--{key}", each) for key, each in own.items() if key in usual and each != usual[key]]
    return " ".join([f"python scripts/ntk_study.py --config configs/studies/{NTK}.yaml", *words])


def _flat(mapping: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """By dotted keys."""
    found: dict[str, Any] = {}
    for key, each in mapping.items():
        found |= _flat(each, f"{place}{key}.") if isinstance(each, dict) else {f"{place}{key}": each}
    return found


def _cells(line: Mapping[str, Any]) -> list[str]:
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


def _figure(content: Mapping[str, Any], measure: str, label: str, theme: Theme) -> Figure:
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
