"""What of the checks keeps `sparse-zero launch` from starting a run?"""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import suppress

from launcher.preflight.examining import ask, findings_of
from launcher.preflight.findings import Finding, has_failed
from launcher.preflight.table import problem_lines
from launcher.preflight.wanted import THIS_MACHINE, Wanted
from sparse_zero.errors import InputError

# A launch asks in passing: a node that needs longer is left to the guards, which wait for it.
_MOST_SECONDS = 10.0


def _say(line: str) -> None:
    with suppress(OSError):  # The terminal may be gone.
        print(f"sparse-zero: {line}", file=sys.stderr, flush=True)


def as_of_launch(findings: Collection[Finding], starting: Collection[str]) -> list[Finding]:
    """What keeps a run from starting; the rest as warnings.

    Whether a node that does not answer is left out, is for the supervisor to decide; one that stands by may be mended
    while the run goes on.

    Args:
        findings: of all nodes.
        starting: names of the nodes on which ranks start at first, if all answer.
    """
    return [
        finding.as_warning() if finding.check == "reachable" or finding.node not in starting else finding
        for finding in findings
    ]


def check_before_launch(wanted: Wanted, starting: Collection[str]) -> None:
    """Look for what would keep the run from starting, within seconds; warnings are printed.

    The ranks that meet, the operators that are built, and the forecast of memory are left to `sparse-zero doctor`: they
    take from seconds to minutes.

    Args:
        wanted: what the run needs.
        starting: see :func:`as_of_launch`.

    Raises:
        InputError: something must be mended; what it is was printed.
    """
    answers = ask(wanted, seconds=min(wanted.config.cluster.node_timeout, _MOST_SECONDS), waits_for_all=False)
    findings = as_of_launch(findings_of(wanted, answers), starting or (THIS_MACHINE,))
    for line in problem_lines(findings):
        _say(line)
    if has_failed(findings):
        failed = [finding for finding in findings if finding.status == "fail"]
        places = list(dict.fromkeys(finding.node for finding in failed))
        raise InputError(
            f"{len(failed)} check{'s' * (len(failed) > 1)} before the start failed on {', '.join(places)}: mend what "
            "is said above (sparse-zero doctor looks again), or set cluster.preflight to false"
        )
