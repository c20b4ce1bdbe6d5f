"""What do all checks together find on the nodes of a run?"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Sequence

from launcher.preflight.asking import Answers, ask_nodes
from launcher.preflight.findings import CHECKS, Finding
from launcher.preflight.machine_checks import MACHINE_CHECKS
from launcher.preflight.reach_checks import check_clocks, check_names, check_reachable
from launcher.preflight.same_checks import SAME_CHECKS
from launcher.preflight.wanted import Wanted, question_of
from launcher.starting.reach import reach_of

# Of the time that a node has, what its own sections may take: what hangs is told by name.
_SECTION_SHARE = 0.6


def _all_checks() -> tuple[Callable[[Wanted, Answers], list[Finding]], ...]:
    return (
        lambda wanted, answers: check_reachable(wanted, answers, python=sys.executable),
        check_names,
        check_clocks,
        *SAME_CHECKS,
        *MACHINE_CHECKS,
    )


def findings_of(wanted: Wanted, answers: Answers) -> list[Finding]:
    """Every check's findings about every node that has answered, and one about each that has not."""
    found = [finding for check in _all_checks() for finding in check(wanted, answers)]
    return in_order(wanted, found)


def in_order(wanted: Wanted, findings: Sequence[Finding]) -> list[Finding]:
    """By check as a run meets them, then by node."""
    nodes = [node.name for node in wanted.nodes]
    return sorted(findings, key=lambda finding: (CHECKS.index(finding.check), nodes.index(finding.node)))


def ask(wanted: Wanted, *, seconds: float, waits_for_all: bool) -> Answers:
    """Ask every node what the checks need.

    Args:
        wanted: what the run needs.
        seconds: within which a node must have answered.
        waits_for_all: see :func:`launcher.preflight.asking.ask_nodes`.
    """
    name = uuid.uuid4().hex
    # ssh tells more of why it cannot connect than the end of the time does.
    reach = reach_of(wanted.config.cluster, connect_seconds=_SECTION_SHARE * seconds)
    questions = {
        node: question_of(wanted, node, mark=f".sparse-zero-{name}-{number}", seconds=_SECTION_SHARE * seconds)
        for number, node in enumerate(wanted.nodes)
    }
    return ask_nodes(questions, reach, seconds, waits_for_all=waits_for_all)
