"""What does a kernel study say, in words, tables and pictures, as JSON, Markdown and one page of HTML?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.page import section, table, write_page
from scripts.benchmarking import machine
from scripts.memory.study_report import Part, drawn, markdown, write_pictures
from scripts.ntk.study_plots import Rows, budget_figure, kernels_figure, mean_and_deviation
from scripts.ntk.study_points import HEAD, Point, Study, points_of
from scripts.ntk.subsets import FULL, MATRICES, VECTORS
from sparse_zero.files import atomic_write_json, atomic_write_text

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {
    FULL: "all parameters",
    MATRICES: "all matrices of the layers",
    VECTORS: "biases and norms of the layers",
    HEAD: "the head alone (its kernel is that of the states)",
}
_HEAD = ("subset", "parameters", "share", "scaled distance", "p=1", "p=2", "CKA", "accuracy", "agreement")


def aggregated(rows: Rows) -> list[dict[str, Any]]:
    """Means and deviations over seeds, by head, shots and subset, in the order of the rows."""
    measures = (
        "scaled_distance", "scaled_distance_test", "trace_distance", "distance_1", "distance_2", "alignment",
        "centred_alignment", "accuracy", "agreement",
    )  # fmt: skip
    found = []
    for key in dict.fromkeys((row["head"], row["shots"], row["subset"]) for row in rows):
        own = [row for row in rows if (row["head"], row["shots"], row["subset"]) == key]
        line = {name: own[0][name] for name in ("head", "shots", "subset", "kind", "budget", "score")}
        line |= {"num_seeds": len(own), "fraction": own[0]["fraction"]}
        line["num_parameters"] = round(sum(row["num_parameters"] for row in own) / len(own))
        for measure in measures:
            line[measure], line[f"{measure}_deviation"] = mean_and_deviation([row[measure] for row in own])
        found.append(line)
    return found


def ranking(lines: Rows) -> list[Mapping[str, Any]]:
    """Lines of one head and number of shots, the nearest to the full kernel first; references are left out."""
    trained = [line for line in lines if line["kind"] not in (FULL, MATRICES, HEAD)]
    return sorted(trained, key=lambda line: float(line["scaled_distance"]))


def _cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    def both(name: str) -> str:
        return f"{line[name]:.3f} ± {line[f'{name}_deviation']:.3f}"

    return (
        _NAMES.get(line["subset"], line["subset"]),
        f"{line['num_parameters']:,}",
        f"{line['fraction']:.2%}",
        both("scaled_distance"),
        f"{line['distance_1']:.3f}",
        f"{line['distance_2']:.3f}",
        both("centred_alignment"),
        f"{line['accuracy']:.1%} ± {line['accuracy_deviation']:.1%}",
        f"{line['agreement']:.1%}",
    )


def _shown_kernels(study: Study, point: Point) -> dict[str, Tensor]:
    """Of the largest budget, each kind by each score, besides the references."""
    files = study.kernels(point)
    config = study.config.subsets
    largest = max(config.per_matrix)
    names = [FULL, *([VECTORS] if config.references else [])]
    names += [f"{kind}s-{largest}-{score}" for kind in config.kinds for score in config.scores]
    names += [f"lora-{rank}" for rank in config.lora_ranks[-1:]]
    return {name: files.kernels[name][: files.told["num_train"]] for name in names}


def parts_of(study: Study, rows: Rows) -> list[Part]:
    """The report's sections."""
    config = study.config
    lines = aggregated(rows)
    seeds = f"{len(config.seeds)} seeds" if len(config.seeds) > 1 else "one seed"
    parts = []
    for head, shots in dict.fromkeys((line["head"], line["shots"]) for line in lines):
        own = [line for line in lines if (line["head"], line["shots"]) == (head, shots)]
        named = f"{f'{head} head, ' if head else ''}{shots} training samples a class"
        ranked = ranking(own)
        references = [line for line in own if line["kind"] in (FULL, MATRICES, HEAD)]
        alone = [row for row in rows if (row["head"], row["shots"]) == (head, shots) and row["subset"] == FULL]
        outputs = mean_and_deviation([row["function_accuracy"] for row in alone])
        parts.append(
            Part(
                name=f"table-{head or config.model.function}-{shots}",
                heading=f"Ranking: {named}",
                text=(
                    f"Means and deviations over {seeds}, the nearest to the kernel of all parameters first. The scaled "
                    "distance is the least of |c K_S - K| / |K| over c; p=1 and p=2 are |K_S - K|_p / |K|_p as they "
                    "are; CKA is the cosine of centred kernels; all of the training samples' kernels. Accuracy is of "
                    f"kernel ridge regression on {config.data.num_test} test samples, agreement with the full kernel's "
                    f"predictions. The function itself, by its sign or largest "
                    f"output and without an offset, has {outputs[0]:.1%} ± {outputs[1]:.1%}."
                ),
                head=_HEAD,
                rows=tuple(_cells(line) for line in (*references, *ranked)),
            )
        )
    parts.append(
        Part(
            name="distance",
            heading="Distance against the budget",
            text="Of the training samples' kernels, after the best scale; bars are deviations over seeds.",
            draw=lambda theme: budget_figure(rows, "scaled_distance", "scaled distance to the full kernel", theme),
        )
    )
    parts.append(
        Part(
            name="accuracy",
            heading="Accuracy against the budget",
            text="Of kernel ridge regression, its ridge term chosen by leave-one-out on the training samples.",
            draw=lambda theme: budget_figure(rows, "accuracy", "accuracy", theme),
        )
    )
    for point in dict.fromkeys(dataclasses.replace(each, seed=config.seeds[0]) for each in points_of(config)):
        if point.shots != config.shots[0]:
            continue
        shown = _shown_kernels(study, point)
        labels = study.kernels(point).told["labels"][: len(next(iter(shown.values())))]
        parts.append(
            Part(
                name=f"kernels-{point.head or config.model.function}",
                heading=f"Kernels{f', {point.head} head' if point.head else ''}",
                text=f"Of the training samples of seed {point.seed}, ordered by class; lines part the classes.",
                draw=lambda theme, shown=shown, labels=labels: kernels_figure(shown, labels, theme),  # type: ignore[misc]
            )
        )
    sketched = [row for row in rows if row["sketch_error"] is not None and row["sketch_error_bound"] > 0]
    if sketched:
        spread = max(row["sketch_error"] for row in sketched)
        bound = max(row["sketch_error_bound"] for row in sketched)
        parts.append(
            Part(
                name="sketch",
                heading="What the sketch adds",
                text=(
                    f"Kernels of whole matrices are sketched with {config.kernel.sketch} directions: their relative "
                    f"error is {spread:.2%} by the spread of its parts, and at most {bound:.2%} by its bound (root "
                    "mean square). It adds to the distances, as a root of squares."
                ),
            )
        )
    return parts


def rows_of_study(study: Study) -> list[dict[str, Any]]:
    """All rows, with the accuracy of the function before training."""
    accuracies = {}
    for point in points_of(study.config):
        told = study.kernels(point).told
        pairs = list(zip(told["function_predictions"], told["labels"], strict=True))[told["num_train"] :]
        accuracies[point.head, point.shots, point.seed] = sum(a == b for a, b in pairs) / len(pairs)
    return [{**row, "function_accuracy": accuracies[row["head"], row["shots"], row["seed"]]} for row in study.rows()]


def write(study: Study, out: Path) -> Sequence[Part]:
    """results.json, report.md, report.html and pictures."""
    from scripts.benchmarks.tables import Table

    rows = rows_of_study(study)
    parts = parts_of(study, rows)
    pictures = drawn(parts)
    write_pictures(pictures, out / "pictures")
    told = {"config": dataclasses.asdict(study.config), "machine": machine(), "summary": aggregated(rows), "rows": rows}
    atomic_write_json(out / "results.json", told)
    atomic_write_text(out / "report.md", f"# Neural tangent kernels\n\n{markdown(parts, 'pictures', level=2)}")
    sections = []
    for part in parts:
        body = f"<p>{escape(part.text)}</p>" + (pictures[part.name][0] if part.name in pictures else "")
        if part.rows:
            body += table(part.rows, head=part.head)
        sections.append(section(part.heading, body, identifier=part.name))
    write_page(out / "report.html", "Neural tangent kernels", sections)
    for part in parts:
        if part.rows:
            Table(part.heading, part.head, part.rows).show()
    print(f"{len(rows)} rows in {out}: results.json, report.md, report.html, pictures")
    return parts
