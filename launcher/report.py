"""What happened in a run? Pictures and one page that needs nothing but itself."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import metrics, plots, summary
from launcher.memory.report import load_memory
from launcher.page import note, picture, section, table, write_page
from launcher.run_folder import SCORES_NAME, SELECTION_NAME
from launcher.selection_map import PLURALS
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_bytes, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparse_zero.selection.region_scores import RegionScores
    from sparse_zero.selection.selection import Selection

FOLDER_NAME = "report"
PAGE_NAME = "report.html"
# What calibration wrote into the run folder, beside the selection.
# Predictions shown of each sort (became right, became wrong, ...), and characters shown of each text.
_MAX_EXAMPLES_OF_A_SORT = 4
_MAX_EXAMPLE_CHARACTERS = 900
_MAX_EVENTS = 200

_SORTS = {
    (False, True): ("Wrong before, right after", "good"),
    (True, False): ("Right before, wrong after", "bad"),
    (False, False): ("Wrong before and after", "bad"),
    (True, True): ("Right before and after", "good"),
}


def flatten(config: object, prefix: str = "") -> list[tuple[str, str]]:
    """A nested config as (dotted key, value) pairs in its own order; lists of plain values stay whole."""
    nested: list[tuple[str, object]]
    if isinstance(config, Mapping) and config:
        nested = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in config.items()]
    elif isinstance(config, list) and any(isinstance(entry, (Mapping, list)) for entry in config):
        nested = [(f"{prefix}[{index}]", value) for index, value in enumerate(config)]
    elif isinstance(config, list):
        return [(prefix, ", ".join(map(_plain, config)) or "(empty)")]
    else:
        return [(prefix, _plain(config))]
    return [pair for key, value in nested for pair in flatten(value, key)]


def _plain(value: object) -> str:
    if value is None:
        return summary.ABSENT
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_config(run_folder: Path) -> dict[str, Any] | None:
    import yaml

    path = run_folder / "config.yaml"
    if not path.exists():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no readable YAML ({reason}): restore or delete it") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no sections: restore or delete it")
    return config


def _read_optional(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the run has not written it."""
    if not path.exists():
        return None
    content = read_json(path, strict=True)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object: restore or delete it")
    return content


def _read_predictions(run_folder: Path) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Before and after ("base", "tuned") -> index of the problem -> prediction; absent files are left out."""
    found = {}
    for name in ("base", "tuned"):
        path = run_folder / "evaluation" / f"{name}.json"
        content = _read_optional(path)
        if content is None:
            continue
        try:
            found[name] = {int(entry["index"]): entry for entry in content["predictions"]}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} holds no list of predictions: evaluate again or delete it") from error
    return found


def _cut(text: object) -> str:
    shown = str(text).strip()
    return shown if len(shown) <= _MAX_EXAMPLE_CHARACTERS else shown[:_MAX_EXAMPLE_CHARACTERS] + " …"


def _answer(title: str, entry: Mapping[str, Any]) -> str:
    verdict = "good" if entry.get("correct") else "bad"
    extracted = str(entry.get("prediction") or "").strip() or "no answer found"
    return (
        f'<div class="answer"><h4>{escape(title)} '
        f'<span class="{verdict}">{escape(_cut(extracted))}</span></h4>'
        f"<pre>{escape(_cut(entry.get('text', '')))}</pre></div>"
    )


def _predictions_section(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    base, tuned = found.get("base", {}), found.get("tuned", {})
    shared = sorted(base.keys() & tuned.keys())
    if not shared:
        return note("The run has not answered the same problems before and after training: nothing to compare.")
    sorts: dict[tuple[bool, bool], list[int]] = {sort: [] for sort in _SORTS}
    for index in shared:
        sorts[bool(base[index].get("correct")), bool(tuned[index].get("correct"))].append(index)
    parts = [
        table(
            [(name, f"{len(sorts[sort]):,}") for sort, (name, _) in _SORTS.items()],
            head=("Problems", "Number"),
        )
    ]
    for sort, (name, _) in _SORTS.items():
        if not sorts[sort]:
            continue
        parts.append(f"<h3>{escape(name)}</h3>")
        for index in sorts[sort][:_MAX_EXAMPLES_OF_A_SORT]:
            problem = tuned[index]
            parts.append(
                f'<article><p class="problem">{escape(_cut(problem.get("instruction", "")))}</p>'
                f'<p class="expected">Expected: <strong>{escape(_cut(problem.get("answer", "")))}</strong>'
                f' <span class="index">problem {index}</span></p><div class="pair">'
                f"{_answer('Before', base[index])}{_answer('After', tuned[index])}</div></article>"
            )
    return "".join(parts)


def _usual(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The median of a number over the training steps; None where they do not have it."""
    found = [summary.as_number(row.get(name)) for row in rows if row["kind"] == "train"]
    return statistics.median(known) if (known := [value for value in found if value is not None]) else None


def _tiles(content: Mapping[str, Any], metric_rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """The numbers that a reader looks for first."""
    rows = dict(summary.summary_rows(content))
    number, accuracy = summary.as_number, summary.as_mapping(content.get("accuracy"))
    parameters, peaks = summary.as_mapping(content.get("parameters")), content.get("peak_memory_bytes_per_rank")
    known = [peak for peak in map(number, peaks if isinstance(peaks, list) else ()) if peak is not None]
    total, trained = number(parameters.get("total")), number(parameters.get("trained"))
    tiles = []
    if number(accuracy.get("tuned")) is not None:
        was = summary.format_percent(accuracy.get("base"))
        tiles.append((summary.format_percent(accuracy["tuned"]), f"accuracy (before: {was})"))
    forgetting = summary.as_mapping(content.get("forgetting"))
    before, after = number(forgetting.get("base")), number(forgetting.get("tuned"))
    if before is not None and after is not None:
        tiles.append((f"{after - before:+.4f}", f"loss a token on other text (before: {before:.4f})"))
    if total and trained is not None:
        tiles.append((summary.format_percent(trained / total), f"of {summary.format_count(total)} parameters trained"))
    if known:
        tiles.append((summary.format_bytes(max(known)), "peak memory of a rank"))
    if number(content.get("tokens_per_second")) is not None:
        tiles.append((rows["Tokens per second"], "tokens per second"))
    done, share = _usual(metric_rows, "flops_per_second"), _usual(metric_rows, "mfu")
    if share is not None:
        tiles.append((summary.format_percent(share), f"MFU ({summary.format_flops(done)} of each rank)"))
    elif done is not None:
        tiles.append((summary.format_flops(done), "of each rank, of the model"))
    if number(content.get("adapter_bytes")):
        tiles.append((rows["Adapter"], "adapter"))
    inner = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in tiles)
    return f'<div class="tiles">{inner}</div>' if tiles else ""


def _picture(name: str, description: str, draw: Callable[[plots.Theme], "Figure"], folder: Path) -> str:
    """Write ``name.png`` and return the same picture, in a light and a dark form, for the page."""
    html, light = picture(description, draw)
    atomic_write_bytes(folder / f"{name}.png", light)
    return html


def _training_section(rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    train = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "validation"]
    if not train:
        return note("The run has not trained yet.")
    skipped = sum(bool(row.get("skipped")) for row in train)
    loss = "Mean negative log-likelihood per response token of each global batch"
    loss += ", and on the validation data." if validation else "."
    if skipped:
        loss += f" {skipped} steps were skipped because loss or gradient was not finite."
    pictures = [
        ("loss", loss, lambda theme: plots.loss_figure(train, validation, theme)),
        (
            "learning_rate",
            "Learning rate of each step.",
            lambda theme: plots.learning_rate_figure(train, theme),
        ),
        (
            "gradient_norm",
            "L2 norm of the gradient of all trained values, before clipping.",
            lambda theme: plots.gradient_norm_figure(train, theme),
        ),
        (
            "throughput",
            "Tokens per second of all ranks together; the floating-point operations of the model (matrix products and "
            "attention, nothing twice, no padding) per second and rank, or their share of what its GPU can do; and the "
            "largest peak memory of a rank.",
            lambda theme: plots.throughput_figure(train, theme),
        ),
    ]
    return "".join(_picture(name, text, draw, folder) for name, text, draw in pictures)


def _selection_section(selection: "Selection", scores: "RegionScores | None", folder: Path) -> str:
    from launcher import selection_page
    from launcher.selection_stats import check_scores_fit

    html = selection_page.show(selection_page.map_drawing(selection), folder)
    if scores is not None:
        try:
            check_scores_fit(selection, scores, SCORES_NAME)
            html += selection_page.captured_html(selection, scores, folder)
        except InputError as error:
            html += note(f"The scores in the run folder are not those of this selection: {error}.")
    rows = [("Digest", selection.digest())]
    rows += [
        (f"Parameters in {PLURALS[kind]}", f"{count:,}") for kind, count in selection.num_parameters_by_kind().items()
    ]
    rows += flatten(selection.metadata) if selection.metadata else []
    return html + table(rows)


def _memory_section(memory: Mapping[str, Any], folder: Path) -> str:
    from launcher.memory import report as memory_report
    from launcher.memory.comparison_plot import comparison_figure

    description = (
        "What the tensors of the fullest rank took at most in each phase: as forecast, simulated and measured, by "
        "kind; and how much the process grew, or what the GPU's allocator held."
    )
    html = _picture("memory", description, lambda theme: comparison_figure(memory, theme), folder)
    html += table(memory_report.comparison_rows(memory), head=memory_report.comparison_head(memory))
    return html + "".join(note(text) for text in memory_report.comparison_notes(memory))


def write_report(run_folder: Path) -> Path:
    """Draw the pictures of a run and write its page, from whatever the run has written so far.

    Args:
        run_folder: the ``output.folder`` of a run, finished or not.

    Returns:
        The page, ``run_folder/report/report.html``; the pictures lie beside it as PNG files.

    Raises:
        InputError: the folder is missing or no run folder, a file in it is damaged, or matplotlib is
            not installed. Nothing is written then.
    """
    from sparse_zero.selection.region_scores import RegionScores
    from sparse_zero.selection.selection import Selection

    if not run_folder.is_dir():
        raise InputError(f"the run folder {run_folder} does not exist: name the output.folder of a run")
    metrics_path, selection_path = run_folder / metrics.FILE_NAME, run_folder / SELECTION_NAME
    config = _read_config(run_folder)
    if config is None and not metrics_path.exists():
        raise InputError(
            f"{run_folder} is no run folder (neither config.yaml nor {metrics.FILE_NAME} in it): "
            "name the output.folder of a run"
        )
    rows = metrics.read_metrics(metrics_path) if metrics_path.exists() else []
    content = _read_optional(run_folder / summary.FILE_NAME)
    selection = Selection.load(selection_path) if selection_path.exists() else None
    scores_path = run_folder / SCORES_NAME
    scores = RegionScores.load(scores_path) if selection is not None and scores_path.exists() else None
    predictions, memory = _read_predictions(run_folder), load_memory(run_folder)
    plots.to_png(plots.loss_figure([]))  # Asks for matplotlib before anything is written.

    folder = run_folder / FOLDER_NAME
    sections = []
    if content is None:
        sections.append(
            section("Summary", note("The run has not ended: there is no summary yet."), identifier="summary")
        )
    else:
        body = _tiles(content, rows) + table(summary.summary_rows(content))
        sections.append(section("Summary", body, identifier="summary"))
    sections.append(section("Training", _training_section(rows, folder), identifier="training"))
    if memory is not None:
        sections.append(section("Memory", _memory_section(memory, folder), identifier="memory"))
    if selection is not None:
        body = _selection_section(selection, scores, folder)
        sections.append(section("Selection", body, identifier="selection"))
    if predictions:
        sections.append(section("Predictions", _predictions_section(predictions), identifier="predictions"))
    events = [(f"{row['step']:,}", str(row.get("event", ""))) for row in rows if row["kind"] == "event"]
    if events:
        body = table(events[-_MAX_EVENTS:], head=("Step", "Event"))
        sections.append(section("Events", body, identifier="events"))
    if config:
        tables = []
        for name, part in config.items():
            pairs = flatten(part) if not isinstance(part, Mapping) or part else []
            tables.append(
                f"<details open><summary>{escape(str(name))}</summary>{table(pairs)}</details>" if pairs else ""
            )
        sections.append(section("Configuration", "".join(tables), identifier="configuration"))
    page = folder / PAGE_NAME
    write_page(page, run_folder.resolve().name, sections)
    return page
