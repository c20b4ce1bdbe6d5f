"""Which pictures and which sections of a page show a selection, its scores, and what it shares with another one?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.page import note, picture, section, sheet_html, table, write_page
from launcher.plots import LIGHT, Theme, to_png
from launcher.score_plots import budget_figure, histogram_figure, score_map_figure, weight_types
from launcher.selection_map import PLURALS, selection_figure, shares_figure
from launcher.selection_overlap import Overlap, jaccard_grid
from launcher.selection_stats import (
    BudgetCurve,
    budget_curves,
    count_regions,
    histograms,
    kinds_and_scores,
    mass_shares,
)
from launcher.selection_tables import budget_sheet, counts_sheet, facts, overlap_sheet
from sparse_zero.files import atomic_write_bytes
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.selection import Selection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PICTURE_BINS = 60
# Another selection: its name, itself, and what both have in common by weight.
Other = tuple[str, Selection, Mapping[str, list[Overlap]]]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture that can be drawn in any theme."""

    # Of the PNG, without suffix.
    name: str
    # What it shows, in a sentence.
    description: str
    draw: Callable[[Theme], "Figure"]


def num_layers(selection: Selection) -> int | None:
    """Layers of the model, if the selection says so."""
    known = selection.metadata.get("num_layers")
    return known if isinstance(known, int) else None


def map_drawing(selection: Selection) -> Drawing:
    """The map of the choice: modules by layers."""
    counts = {name: weight.num_parameters_by_kind() for name, weight in selection.weights.items()}
    text = (
        f"{selection.num_parameters:,} parameters are trained in {len(selection.weights):,} weights. "
        "Grey weights are not trained; each panel has its own scale."
    )
    layers = num_layers(selection)
    return Drawing(name="selection", description=text, draw=lambda theme: selection_figure(counts, layers, theme))


def score_drawings(selection: Selection, scores: RegionScores, curves: Sequence[BudgetCurve]) -> list[Drawing]:
    """Where the score mass lies, what a budget captures of it (``curves``), and how chosen and other regions differ."""
    layers = num_layers(selection)
    mass = [
        (f"Score mass: {PLURALS[kind]} by {score}", mass_shares(scores, kind, score, layers))
        for kind, score in kinds_and_scores(scores)
    ]
    drawings = [
        Drawing(
            name="score-mass",
            description="Share of the score mass of all candidate regions of a kind that lies in each weight.",
            draw=lambda theme: shares_figure(mass, theme),
        ),
        Drawing(
            name="budget-curve",
            description="Share of the score mass that regions with the highest scores capture, whichever modules they "
            "lie in, against their parameters; the selection, and multiples of what it spends.",
            draw=lambda theme: budget_figure(curves, theme),
        ),
    ]
    found = histograms(selection, scores, _PICTURE_BINS)
    if found:
        drawings.append(
            Drawing(
                name="score-histogram",
                description="Number of regions by score, of all candidates and of the chosen ones; both axes are "
                "logarithmic where scores are positive.",
                draw=lambda theme: histogram_figure(found, theme),
            )
        )
    return drawings


def score_map_drawings(selection: Selection, scores: RegionScores) -> list[Drawing]:
    """The score of every region, a picture for each module type and kind."""
    return [
        Drawing(
            name=f"scores-{shown.name}",
            description=f"Score of every candidate region in {shown.module} ({PLURALS[shown.candidates[0].kind]}); the "
            "chosen ones are marked.",
            draw=lambda theme, shown=shown: score_map_figure(shown, scores, selection, theme),  # type: ignore[misc]
        )
        for shown in weight_types(scores)
    ]


def overlap_drawing(compared: Mapping[str, list[Overlap]], layers: int | None) -> Drawing:
    """Where two selections agree."""
    grid = jaccard_grid(compared, layers)
    return Drawing(
        name="overlap",
        description="Jaccard index of the trained entries: those in both selections over those in either. Grey: no "
        "entry in common, or none in either.",
        draw=lambda theme: shares_figure([("Overlap of the two selections (Jaccard index)", grid)], theme),
    )


def write_pngs(drawings: Sequence[Drawing], folder: Path) -> None:
    """Write every picture as ``folder/name.png``."""
    for drawing in drawings:
        atomic_write_bytes(folder / f"{drawing.name}.png", to_png(drawing.draw(LIGHT)))


def show(drawing: Drawing, folder: Path | None = None) -> str:
    """The picture as HTML; its light form is also written into ``folder``, if one is given."""
    html, light = picture(drawing.description, drawing.draw)
    if folder is not None:
        atomic_write_bytes(folder / f"{drawing.name}.png", light)
    return html


def captured_html(selection: Selection, scores: RegionScores, folder: Path | None = None) -> str:
    """What the scores tell of a selection: tables, and pictures that are also written into ``folder``."""
    parts = [sheet_html(counts_sheet(count_regions(selection, scores, "module"), "module", has_scores=True))]
    curves = budget_curves(selection, scores)
    parts += [show(drawing, folder) for drawing in score_drawings(selection, scores, curves)]
    return "".join(parts) + (sheet_html(budget_sheet(curves)) if curves else "")


def all_drawings(selection: Selection, scores: RegionScores | None, other: Other | None) -> list[Drawing]:
    """Every picture there is of a selection, of its scores if they are known, and of the overlap with another one."""
    drawings = [map_drawing(selection)]
    if scores is not None:
        drawings += score_drawings(selection, scores, budget_curves(selection, scores))
        drawings += score_map_drawings(selection, scores)
    if other is not None:
        drawings.append(overlap_drawing(other[2], num_layers(selection)))
    return drawings


def write_selection_page(
    path: Path,
    name: str,
    selection: Selection,
    scores: RegionScores | None,
    other: Other | None,
    pictures: Path | None = None,
) -> None:
    """Write one page that needs nothing but itself.

    Args:
        path: the file.
        name: of the selection, for the title.
        selection: what was chosen.
        scores: of its candidates, if they are known.
        other: another selection, and what both have in common.
        pictures: a folder that the pictures are also written into.
    """
    first = table([*facts(selection, scores), ("Digest", selection.digest())]) + show(map_drawing(selection), pictures)
    if scores is None:
        first += sheet_html(counts_sheet(count_regions(selection, None, "module"), "module", has_scores=False))
    by_layer = counts_sheet(count_regions(selection, scores, "layer"), "layer", has_scores=scores is not None)
    sections = [section("Selection", first + sheet_html(by_layer), identifier="selection")]
    if other is not None:
        other_name, second, compared = other
        body = note(f"PATH is {name}, OTHER is {other_name}.") + table(
            [*facts(second, None), ("Digest", second.digest())]
        )
        body += sheet_html(overlap_sheet(compared, "module")) + show(
            overlap_drawing(compared, num_layers(selection)), pictures
        )
        sections.append(section("Overlap", body, identifier="overlap"))
    if scores is not None:
        sections.append(section("Scores", captured_html(selection, scores, pictures), identifier="scores"))
        maps = "".join(show(drawing, pictures) for drawing in score_map_drawings(selection, scores))
        sections.append(section("Scores of every region", maps, identifier="maps"))
    write_page(path, name, sections)
