"""How are findings shown in a terminal, and as JSON?"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from launcher.preflight.findings import CHECKS, Finding, Status, has_failed

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 80
_MAX_WIDTH = 110
# Groups of nodes beside each other.
_MAX_COLUMNS = 4
_WORDS: dict[Status | None, str] = {"ok": "ok", "warn": "warn", "fail": "FAIL", None: "-"}
_STYLES: dict[Status | None, str] = {"ok": "green", "warn": "yellow", "fail": "bold red", None: "dim"}
_ORDER: tuple[Status, ...] = ("fail", "warn", "ok")


def _status(findings: Sequence[Finding], node: str, check: str) -> Status | None:
    """The worst of one check on one node; None where it was not asked."""
    found = [finding.status for finding in findings if (finding.node, finding.check) == (node, check)]
    return next((status for status in _ORDER if status in found), None)


def _named(nodes: Sequence[str]) -> str:
    return nodes[0] if len(nodes) == 1 else ", ".join(nodes[:2]) if len(nodes) == 2 else f"{nodes[0]} +{len(nodes) - 1}"


def result_tables(nodes: Sequence[str], findings: Sequence[Finding]) -> list[Table]:
    """Checks by nodes; nodes of the same results share a column."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    checks = [check for check in CHECKS if any(finding.check == check for finding in findings)]
    groups: dict[tuple[Status | None, ...], list[str]] = {}
    for node in nodes:
        groups.setdefault(tuple(_status(findings, node, check) for check in checks), []).append(node)
    columns = list(groups.items())
    tables = []
    for start in range(0, len(columns), _MAX_COLUMNS):
        part = columns[start : start + _MAX_COLUMNS]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("check", no_wrap=True)
        for _, names in part:
            # Names of nodes may hold what rich would take for its markup.
            table.add_column(Text(_named(names)), overflow="fold")
        table.add_column("found", overflow="fold", ratio=1)
        for number, check in enumerate(checks):
            cells = [Text(_WORDS[statuses[number]], style=_STYLES[statuses[number]]) for statuses, _ in part]
            table.add_row(check, *cells, Text(_told(findings, check)))
        tables.append(table)
    return tables


def _plain(text: str) -> str:
    """In one line, without what a terminal would obey: paths may hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def _told(findings: Sequence[Finding], check: str) -> str:
    """What of a check is worth a line in the table: what is well, as its first node has it."""
    well = [finding for finding in findings if finding.check == check and finding.status == "ok"]
    bad = [finding for finding in findings if finding.check == check and finding.status != "ok"]
    if bad:
        return "see below"
    return "; ".join(_plain(finding.what) for finding in well if finding.node == well[0].node)


def problem_lines(findings: Iterable[Finding]) -> list[str]:
    """What is to be mended, then what may be, each with its remedy; nodes of which the same is said share a line."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for finding in findings:
        if finding.status != "ok":
            said = (finding.status, finding.check, _plain(finding.what), _plain(finding.remedy))
            groups.setdefault(said, []).append(finding.node)
    lines = []
    for (status, check, what, remedy), nodes in sorted(groups.items(), key=lambda item: item[0][0] != "fail"):
        lines.append(f"{_WORDS['fail' if status == 'fail' else 'warn']} {', '.join(nodes)}: {check}: {what}")
        lines += [f"     -> {remedy}"] if remedy else []
    return lines


def verdict(findings: Sequence[Finding], seconds: float) -> str:
    """The last line."""
    failed = sum(finding.status == "fail" for finding in findings)
    warned = sum(finding.status == "warn" for finding in findings)
    well = f"{len(findings) - failed - warned} checks are well"
    counted = (
        [f"{failed} failed"] * bool(failed) + [f"{warned} warnings"] * (warned > 1) + ["1 warning"] * (warned == 1)
    )
    told = ", ".join([well, *counted])
    return f"{told} ({seconds:.1f} s)" + ("; mend what failed before you start" if failed else "")


def show(nodes: Sequence[str], findings: Sequence[Finding], notes: Sequence[str], seconds: float) -> None:
    """Tables, problems and the verdict, on the standard output."""
    from rich.console import Console

    width = max(_WIDTH, min(shutil.get_terminal_size((_WIDTH, 24)).columns, _MAX_WIDTH))
    console = Console(width=width, highlight=False, force_terminal=None if sys.stdout.isatty() else False)
    for table in result_tables(nodes, findings):
        console.print(table)
    # Whole lines: what is copied from them must not be broken.
    for line in [*problem_lines(findings), *notes, verdict(findings, seconds)]:
        console.print(line, markup=False, soft_wrap=True)


def as_json(nodes: Sequence[str], findings: Sequence[Finding], notes: Sequence[str], seconds: float) -> dict[str, Any]:
    """The same, for programs."""
    return {
        "ok": not has_failed(findings),
        "nodes": list(nodes),
        "findings": [
            {
                "node": finding.node,
                "check": finding.check,
                "status": finding.status,
                "what": finding.what,
                "remedy": finding.remedy,
            }
            for finding in findings
        ],
        "notes": list(notes),
        "seconds": seconds,
    }
