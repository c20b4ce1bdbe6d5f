"""What did a check find on a node, how bad is it, and what mends it?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Status = Literal["ok", "warn", "fail"]

# Rows of the table, in the order in which a run would meet them.
CHECKS = (
    "reachable",
    "names",
    "clock",
    "versions",
    "code",
    "gpus",
    "model",
    "data",
    "output",
    "disk",
    "shared memory",
    "open files",
    "port",
    "build cache",
    "memory",
    "network",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer of one check about one node."""

    node: str
    # One of CHECKS.
    check: str
    status: Status = "ok"
    # What was found, in one line.
    what: str
    # What mends it; empty where nothing is to be mended.
    remedy: str = ""
    # Whether `launch` starts all the same: it may be mended by itself meanwhile, or be seen wrongly from here.
    lets_launch: bool = False

    def as_warning(self) -> Finding:
        """The same, where it does not keep a run from starting."""
        return replace(self, status="warn") if self.status == "fail" else self


def has_failed(findings: Iterable[Finding]) -> bool:
    """Whether something must be mended."""
    return any(finding.status == "fail" for finding in findings)
