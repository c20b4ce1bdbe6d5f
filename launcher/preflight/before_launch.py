"""What of the checks keeps `sparse-zero launch` from starting a run?"""

from __future__ import annotations

from collections.abc import Collection

from launcher.preflight.asking import Answers
from launcher.preflight.examining import ask, findings_of
from launcher.preflight.findings import Finding
from launcher.preflight.table import problem_lines
from launcher.preflight.wanted import THIS_MACHINE, Wanted
from launcher.saying import say
from sparse_zero.errors import InputError

# A launch asks in passing: a node that needs longer is left to the guards, which wait for it.
_MOST_SECONDS = 10.0


def as_of_launch(findings: Collection[Finding], starting: Collection[str]) -> list[Finding]:
    """What keeps a run from starting; the rest as warnings.

    Whether a node that does not answer is left out, is for the supervisor to decide; one that stands by may be mended
    while the run goes on; and what only may keep a run from starting, the run will tell.

    Args:
        findings: of all nodes.
        starting: names of the nodes on which ranks start at first, if all answer.
    """
    return [
        finding.as_warning()
        if finding.check == "reachable" or finding.lets_launch or finding.node not in starting
        else finding
        for finding in findings
    ]


def check_before_launch(wanted: Wanted, starting: Collection[str]) -> Answers:
    """Look for what would keep the run from starting, within seconds; warnings are printed.

    Processes that meet and operators that are built are left to `sparse-zero doctor`: they take seconds to minutes.

    Args:
        wanted: what the run needs.
        starting: see :func:`as_of_launch`.

    Returns:
        What the nodes have told, for :class:`launcher.preflight.forecast_beside.ForecastBeside`.

    Raises:
        InputError: something must be mended; what it is was printed.
    """
    answers = ask(wanted, seconds=min(wanted.config.cluster.node_timeout, _MOST_SECONDS), waits_for_all=False)
    findings = as_of_launch(findings_of(wanted, answers), starting or (THIS_MACHINE,))
    for line in problem_lines(findings):
        say(line)
    failed = [finding for finding in findings if finding.status == "fail"]
    if failed:
        first = failed[0]
        more = f"; and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise InputError(
            f"before the start, {first.check} failed on {first.node} ({first.what}){more}: mend what is said above "
            "(sparse-zero doctor looks again), or set cluster.preflight to false"
        )
    return answers
