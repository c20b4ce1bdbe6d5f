"""Which rows and columns tell what was chosen, what a budget reaches, and what two selections share?

Plain text in cells: a terminal and a page show the same tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.selection_map import PLURALS, short_names
from launcher.selection_overlap import Overlap, overall, overlaps_by
from launcher.selection_stats import BudgetCurve, By, Count, Place, total_of
from launcher.summary import ABSENT, as_mapping, as_number, format_count, format_percent
from sparse_zero.selection.config import KINDS
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.selection import Selection

# Multiples of the actual budget whose reach is told.
BUDGET_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table as text."""

    title: str
    # May have line ends.
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    # Leading columns that are words; the others are numbers.
    num_words: int
    # Numbers of the rows that are sums of others.
    sums: frozenset[int] = frozenset()
    # Numbers of the columns that are left out where there is no room for all, the names cut short otherwise.
    optional: frozenset[int] = frozenset()
    # What the columns mean.
    note: str = ""


def _share(value: float | None) -> str:
    return ABSENT if value is None else format_percent(value).replace(" ", "")


def _names(places: Sequence[Place], by: By) -> dict[Place, str]:
    """What the rows are called."""
    distinct = list(dict.fromkeys(places))
    if by == "layer":
        return {place: "none" if place.layer is None else str(place.layer) for place in distinct}
    names = [place.name or "" for place in distinct]
    return dict(zip(distinct, short_names(names) if by == "module" else names, strict=True))


def facts(selection: Selection, scores: RegionScores | None) -> list[tuple[str, str]]:
    """Size, scores, captured mass, rest of the budget and margin at the cut, as far as they are known."""
    known = selection.metadata
    total, number = as_number(known.get("num_parameters_model")), selection.num_parameters
    size = f"{number:,}" + (f" of {total:,.0f} ({format_percent(number / total)})" if total else "")
    rows = [("Parameters", f"{size} in {len(selection.weights):,} weights")]
    depth = as_mapping(known.get("depth"))
    lowest, operations = as_number(depth.get("lowest_layer")), as_number(depth.get("step_operations"))
    layers = as_number(known.get("num_layers"))
    if lowest is not None and operations is not None and layers:
        where = (
            "the embeddings" if lowest < 0 else "none" if lowest >= layers else f"{lowest:.0f} of 0 to {layers - 1:.0f}"
        )
        rows.append(
            ("Lowest layer", f"{where}: a step has {format_percent(operations)} of the operations of all layers'")
        )
    used = sorted({c.score for c in scores.candidates}) if scores else []
    if used:
        assert scores is not None
        batches = as_number(scores.metadata.get("num_calibration_batches"))
        rows.append(("Score", ", ".join(used) + (f", from {batches:.0f} micro-batches" if batches else "")))
    captured = scores.share_captured(selection)["by_kind"] if scores else None
    captured = captured or as_mapping(as_mapping(known.get("share_captured")).get("by_kind"))
    if captured:
        shares = [f"{PLURALS[kind]} {format_percent(captured[kind])}" for kind in KINDS if kind in captured]
        rows.append(("Score mass captured", ", ".join(shares)))
    left = [
        f"{amount:,.0f} {unit}"
        for unit, key in (
            ("bytes", "bytes_left"),
            ("parameters", "num_parameters_left"),
            ("regions", "num_regions_left"),
        )
        if (amount := as_number(known.get(key))) is not None
    ]
    if left:
        rows.append(("Left of the budget", ", ".join(left)))
    for group in known.get("groups") or ():
        of = ", ".join(group["modules"])
        rows.append((f"  group {of}", f"{group['left']:,} of {group['allowed']:,} left"))
    for name, key in (("Margin at the cut", "cut_margin"), ("Margin, per matrix", "per_matrix_cut_margin")):
        margin = as_number(known.get(key))
        if margin is not None:
            rows.append((name, f"{margin:.2g}, relative: last chosen to first refused score"))
    return rows


def counts_sheet(counts: Sequence[Count], by: By, *, has_scores: bool) -> Sheet:
    """A row for every place and kind; sums of attention, MLP and so on stand above their modules.

    Args:
        counts: as from ``count_regions`` with the same ``by``.
        by: what a row stands for.
        has_scores: whether candidates and score mass are known.
    """
    is_weight = by == "weight"
    head = [by, *(["shape"] if is_weight else []), "kind", *(["candidates"] if has_scores else [])]
    head += ["regions", "parameters", "share", *(["captured"] if has_scores else [])]
    rows: list[tuple[str, ...]] = []
    sums: set[int] = set()

    def add(name: str, kind: str, count: Count) -> None:
        cells = [name, *([" x ".join(map(str, min(count.shapes.values())))] if is_weight else []), kind]
        cells += [f"{count.candidates:,}" if count.candidates else ABSENT] if has_scores else []
        cells += [f"{count.regions:,}", f"{count.parameters:,}" if is_weight else format_count(count.parameters)]
        cells += [_share(count.parameters / count.entries), *([_share(count.share_captured)] * has_scores)]
        rows.append(tuple(cells))

    def add_sum(name: str, members: Sequence[Count]) -> None:
        sums.add(len(rows))
        add(name, "", total_of(members, Place()))

    names = _names([count.place for count in counts], by)
    previous: Place | None = None
    for count in counts:
        if by == "module" and (previous is None or previous.role != count.place.role):
            add_sum(str(count.place.role), [each for each in counts if each.place.role == count.place.role])
        name = names[count.place] if is_weight or count.place != previous else ""
        indent = "  " if by == "module" and name else ""
        add(indent + name, count.label, count)
        previous = count.place
    if len(counts) > 1 and not is_weight:
        add_sum("all", counts)
    its = "of the weight's own entries" if is_weight else "of the entries of these weights"
    note = f"share: {its}" + ("" if is_weight or has_scores else ", where a region is chosen")
    if has_scores:
        note += "; captured: share of the score mass of all candidates"
    title = "Selection by " + by
    return Sheet(
        title=title,
        head=tuple(head),
        rows=tuple(rows),
        num_words=3 if is_weight else 2,
        sums=frozenset(sums),
        optional=frozenset(head.index(name) for name in ("shape", "candidates") if is_weight and name in head),
        note=note,
    )


def budget_sheet(curves: Sequence[BudgetCurve]) -> Sheet:
    """What share of the score mass other budgets could capture."""
    head = ("kind", "score", "parameters", "captured", *(f"{factor:g}x" for factor in BUDGET_FACTORS))
    rows = tuple(
        (
            curve.kind,
            curve.score,
            format_count(curve.actual_spent),
            _share(curve.actual_captured),
            *(
                _share(curve.at(factor * curve.actual_spent))
                if factor * curve.actual_spent <= curve.num_entries
                else ABSENT
                for factor in BUDGET_FACTORS
            ),
        )
        for curve in curves
    )
    return Sheet(
        title="Score mass that multiples of the budget could capture",
        head=head,
        rows=rows,
        num_words=2,
        note="captured: by this selection; then by regions of so many parameters with the highest scores, in "
        "whichever modules",
    )


def overlap_sheet(compared: Mapping[str, list[Overlap]], by: By) -> Sheet:
    """Entries and regions in both selections and in one of them, by place and kind, and over the model."""
    head = (by, "kind", "PATH", "OTHER", "common", "Jaccard", "regions\nin both", "only in\nPATH", "only in\nOTHER")
    details = overlaps_by(compared, by)
    names = _names([each.place for each in details], by)
    rows: list[tuple[str, ...]] = []
    previous: Place | None = None

    def add(name: str, kind: str, each: Overlap) -> None:
        entries = map(format_count, (each.first, each.second, each.common))
        regions = (each.regions_common, each.regions_first_only, each.regions_second_only)
        rows.append((name, kind, *entries, f"{each.jaccard:.3f}", *(f"{number:,}" for number in regions)))

    for each in details:
        add(names[each.place] if by == "weight" or each.place != previous else "", str(each.kind), each)
        previous = each.place
    first_sum = len(rows)
    sums = overall(compared)
    for number, each in enumerate(sums if len(sums) > 2 else sums[-1:]):
        add("" if number else "all", each.kind or "any kind", each)
    return Sheet(
        title=f"Overlap by {by}",
        head=head,
        rows=tuple(rows),
        num_words=2,
        sums=frozenset(range(first_sum, len(rows))),
        note="parameters in either selection and in both; Jaccard: common over all that either trains; then regions in "
        "both, and in one only (blocks of different sizes are different regions)",
    )
