"""What does a memory study say, in words, tables and pictures, as Markdown and as one page of HTML?"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.page import note, picture, section, table, write_page
from launcher.plots import Theme
from scripts.memory import study_plots
from scripts.memory.study_config import StudyConfig
from scripts.memory.study_plots import GIB, Rows, short
from scripts.memory.study_points import TRAINING
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_bytes, atomic_write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN, END = "<!-- begin: made by scripts/memory_study.py -->", "<!-- end: made by scripts/memory_study.py -->"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One section of the report; of picture and table either may be missing."""

    # File name of the picture, without its ending.
    name: str
    heading: str
    text: str
    draw: Callable[[Theme], Figure] | None = None
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def gib(num_bytes: float | None) -> str:
    """A cell of a table."""
    return "" if num_bytes is None else f"{num_bytes / GIB:,.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


_SETUP = ("model", "stage", "ranks", "checkpointing")


def _setup(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Cells of a row under :data:`_SETUP`."""
    checkpoints = "yes" if row["gradient_checkpointing"] else "no"
    return row["model"], str(row["stage"]), str(row["world_size"]), checkpoints


def of_curve(rows: Rows, curve: str) -> Rows:
    """The rows of one axis."""
    return [row for row in rows if row["curve"] == curve]


def _pivot(rows: Rows, axis: str, label: Callable[[Any], str]) -> dict[str, Any]:
    """A table of methods by values of an axis: ``head`` and ``rows`` of a :class:`Part`."""
    values = sorted({row[axis] for row in rows})
    found = {(row["method"], row[axis]): row["peak_bytes"] for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    lines = tuple((method, *(gib(found.get((method, value))) for value in values)) for method in methods)
    return {"head": ("GiB", *map(label, values)), "rows": lines}


def reductions(rows: Rows) -> list[dict[str, Any]]:
    """By which share SMT's training needs less than full fine-tuning, in each setup of the headline."""

    def simulated(row: Mapping[str, Any]) -> float | None:
        peaks = [row.get(f"simulated_{phase}_bytes") for phase in TRAINING]
        known = [peak for peak in peaks if peak is not None]
        return max(known) if known else None

    keys = ("model", "stage", "gradient_checkpointing", "world_size")
    full = {tuple(row[key] for key in keys): row for row in rows if row["method"] == "full"}
    found = []
    for row in rows:
        if row["method"] != "smt":
            continue
        other = full[tuple(row[key] for key in keys)]
        ours, theirs = simulated(row), simulated(other)
        found.append(
            {
                **{key: row[key] for key in keys},
                "smt_bytes": row["training_bytes"],
                "full_bytes": other["training_bytes"],
                "reduction": 1 - row["training_bytes"] / other["training_bytes"],
                "simulated_reduction": None if ours is None or theirs is None else 1 - ours / theirs,
                "calibration_bytes": row.get("calibration_bytes"),
            }
        )
    return found


def _headline(config: StudyConfig, rows: Rows) -> Part:
    found = reductions(rows)
    claimed = config.headline.claimed
    nearest = min(found, key=lambda row: abs(row["reduction"] - claimed))
    text = (
        f"SMT's paper (arXiv 2405.15525) tells of {claimed:.0%} less GPU memory than full fine-tuning. By its recipe "
        "the share depends on ranks, stage and activations: from "
        f"{min(row['reduction'] for row in found):.0%} to {max(row['reduction'] for row in found):.0%} here (bf16, "
        f"fp32 masters and moments, micro-batches of {config.headline.micro_batch} x {config.headline.length}). On one "
        "rank it is more, since all of full fine-tuning's states lie there; with ZeRO those are shared out, and the "
        f"base that both hold weighs more. The setup nearest to the figure is {nearest['model']} at stage "
        f"{nearest['stage']} on {nearest['world_size']} rank{'s' if nearest['world_size'] > 1 else ''} "
        f"{'with' if nearest['gradient_checkpointing'] else 'without'} gradient checkpointing: "
        f"{nearest['reduction']:.0%}."
    )
    lines = tuple(
        (
            *_setup(row),
            gib(row["full_bytes"]),
            gib(row["smt_bytes"]),
            _share(row["reduction"]),
            _share(row["simulated_reduction"]),
        )
        for row in found
        if row["simulated_reduction"] is not None or row is nearest
    )
    head = (*_SETUP, "full, GiB", "SMT, GiB", "less", "less, simulated")
    return Part(
        name="headline",
        heading="SMT beside full fine-tuning",
        text=text,
        draw=lambda theme: study_plots.headline_figure(found, claimed, theme),
        head=head,
        rows=lines,
    )


def _calibration(rows: Rows) -> Part | None:
    found = [row for row in reductions(rows) if row["calibration_bytes"]]
    if not found:
        return None
    higher = [row for row in found if row["calibration_bytes"] > row["smt_bytes"]]
    most = max(row["calibration_bytes"] / row["smt_bytes"] for row in found)
    text = (
        f"Scoring with frozen weights comes before training, in micro-batches of the same size. In {len(found)} setups "
        f"of the headline it takes at most {most:.1%} of what training takes"
        + ("." if not higher else f"; in {len(higher)} of them it takes more than training.")
    )
    lines = tuple(
        (
            *_setup(row),
            gib(row["calibration_bytes"]),
            gib(row["smt_bytes"]),
        )
        for row in found
        if row["world_size"] in (1, 8)
    )
    head = (*_SETUP, "calibration, GiB", "training, GiB")
    return Part(name="calibration", heading="Calibration", text=text, head=head, rows=lines)


def _frontier(config: StudyConfig, rows: Rows) -> Part:
    cells = {
        (row["method"], row["gpu_gib"], row["world_size"]): f"{row['parameters'] / 1e9:.3g}B, z{row['stage']}"
        for row in rows
    }
    worlds = sorted({row["world_size"] for row in rows})
    pairs = dict.fromkeys((row["method"], row["gpu_gib"]) for row in rows)
    lines = tuple(
        (f"{method}, {memory:g} GiB", *(cells.get((method, memory, world), "") for world in worlds))
        for method, memory in pairs
    )
    return Part(
        name="frontier",
        heading="The largest model",
        text=(
            "Llamas with as many layers as there are 128s in their width, as Llama 2 7B and 13B are. A model fits when "
            "its peak, with the CUDA context, is within 95% of the memory. z2 and z3 are the stages; larger ones than "
            f"with {config.frontier.most_layers} layers are not tried."
        ),
        draw=lambda theme: study_plots.frontier_figure(rows, theme),
        head=("", *(f"{world} GPUs" if world > 1 else "1 GPU" for world in worlds)),
        rows=lines,
    )


def _checked(rows: Rows) -> Part | None:
    known = [row for row in rows if row.get("simulated_peak_bytes")]
    if not known:
        return None
    errors = [abs(row["peak_bytes"] / row["simulated_peak_bytes"] - 1) for row in known]
    return Part(
        name="checked",
        heading="How right these curves are",
        text=(
            f"{len(known)} of the points were simulated, the circles in the pictures. The closed form differs from "
            f"them by {statistics.median(errors):.2%} in the median and {max(errors):.2%} at most."
        ),
    )


def parts_of(config: StudyConfig, rows: Rows) -> list[Part]:
    """The report's sections."""
    base = config.base
    job = (
        f"{base.model}, {base.world_size} ranks, stage {base.stage}, micro-batches of {base.micro_batch} x "
        f"{base.length} tokens, bf16, gradient checkpointing {'on' if base.gradient_checkpointing else 'off'}"
    )
    worlds = [row for row in of_curve(rows, "world_size") if row["stage"] == max(config.stages)]
    lengths = of_curve(rows, "length")
    batches, budgets, models = (of_curve(rows, name) for name in ("micro_batch", "budget", "model"))
    found = [
        _headline(config, of_curve(rows, "headline")),
        _calibration(of_curve(rows, "headline")),
        Part(
            name="world_size",
            heading="Ranks and stages",
            text=f"Peak bytes of one rank over all phases. The rest as in: {job}. The table is of stage "
            f"{max(config.stages)}.",
            draw=lambda theme: study_plots.world_figure(of_curve(rows, "world_size"), theme),
            **_pivot(worlds, "world_size", short),
        ),
        Part(
            name="length",
            heading="Sequence length",
            text="Every position has a label, so that logits grow with the length as activations do.",
            draw=lambda theme: study_plots.length_figure(lengths, theme),
            **_pivot([row for row in lengths if row["gradient_checkpointing"]], "length", short),
        ),
        Part(
            name="micro_batch",
            heading="Micro-batch",
            text="Samples of a rank in one forward pass.",
            draw=lambda theme: study_plots.axis_figure(
                batches, "micro_batch", heading="Against the micro-batch", xlabel="samples", label=short, theme=theme
            ),
            **_pivot(batches, "micro_batch", short),
        ),
        Part(
            name="budget",
            heading="Budget",
            text="The trained share of all parameters. For LoRA and DoRA it is the rank that trains as many.",
            draw=lambda theme: study_plots.axis_figure(
                budgets,
                "budget",
                heading="Against the budget",
                xlabel="trained share of the parameters",
                label=lambda value: f"{value:.1%}",
                theme=theme,
            ),
            **_pivot(budgets, "budget", lambda value: f"{value:.1%}"),
        ),
        Part(
            name="model",
            heading="Model size",
            text="The table is of stage 3. Logits grow with the vocabulary, which is larger in some of the models.",
            draw=lambda theme: study_plots.model_figure(models, theme),
            **_pivot([row for row in models if row["stage"] == 3], "parameters", lambda n: f"{n / 1e9:.2g}B"),
        ),
        _frontier(config, of_curve(rows, "frontier")) if of_curve(rows, "frontier") else None,
        _checked(rows),
    ]
    return [part for part in found if part is not None]


def markdown(parts: Sequence[Part], pictures: str, *, level: int) -> str:
    """The sections as Markdown.

    Args:
        parts: of :func:`parts_of`.
        pictures: the folder of the pictures, as the text's reader finds it.
        level: of the headings.
    """
    lines: list[str] = []
    for part in parts:
        lines += [f"{'#' * level} {part.heading}", "", *_wrapped(part.text), ""]
        if part.draw is not None:
            lines += [f"![{part.heading}]({pictures}/{part.name}.png)", ""]
        if part.rows:
            lines += ["| " + " | ".join(part.head) + " |", "|" + "---|" * len(part.head)]
            lines += ["| " + " | ".join(row) + " |" for row in part.rows]
            lines += [""]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def drawn(parts: Sequence[Part]) -> dict[str, tuple[str, bytes]]:
    """By the names of the sections that have a picture, its HTML and its PNG."""
    return {part.name: picture(part.heading, part.draw) for part in parts if part.draw is not None}


def write_pictures(pictures: Mapping[str, tuple[str, bytes]], folder: Path) -> None:
    """The PNGs of :func:`drawn`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, png) in pictures.items():
        atomic_write_bytes(folder / f"{name}.png", png)


def write_html(path: Path, parts: Sequence[Part], pictures: Mapping[str, tuple[str, bytes]]) -> None:
    """One page that needs nothing but itself."""
    sections = []
    for part in parts:
        body = f"<p>{escape(part.text)}</p>"
        if part.name in pictures:
            body += pictures[part.name][0]
        if part.rows:
            body += table(part.rows, head=part.head)
        sections.append(section(part.heading, body, identifier=part.name))
    sections.append(note("By the closed form; circles are simulations. Bytes of tensors, without the CUDA context."))
    write_page(path, "Memory study", sections)


def check_markers(path: Path) -> None:
    """Refuse a file without the place for the generated part.

    Raises:
        InputError: the file or one of its markers is missing.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    if text is None:
        raise InputError(f"--markdown-into is {path}: there is no such file")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"--markdown-into is {path}: it must have the lines {BEGIN} and {END}, once and in this order")


def write_into(path: Path, parts: Sequence[Part], pictures: Mapping[str, tuple[str, bytes]], command: str) -> None:
    """Replace what stands between the markers of a Markdown file, and its pictures in the folder of its name."""
    check_markers(path)
    text = path.read_text(encoding="utf-8")
    folder = path.with_suffix("")
    write_pictures(pictures, folder)
    made = f"{BEGIN}\n\nMade by `{command}`.\n\n{markdown(parts, folder.name, level=3)}\n{END}"
    atomic_write_text(path, re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: made, text, flags=re.DOTALL))
