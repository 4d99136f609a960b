"""What `fedlora site check` finds, one thing at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Mark = Literal["good", "warning", "bad", "refused"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the table."""

    check: str
    mark: Mark
    """bad: the owner can put it right; refused: policy or ledger let nothing run."""
    found: str
    advice: str = ""
    """What to do, where it is not good."""


def good(check: str, found: str) -> Finding:
    return Finding(check=check, mark="good", found=found)


def warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check=check, mark="warning", found=found, advice=advice)


def bad(check: str, found: str, advice: str) -> Finding:
    return Finding(check=check, mark="bad", found=found, advice=advice)


def refused(check: str, found: str, advice: str) -> Finding:
    return Finding(check=check, mark="refused", found=found, advice=advice)


def exit_code(findings: Iterable[Finding]) -> int:
    """0: all is good, or only to be known; 2: something is to be put right; 3: policy or ledger refuse."""
    marks = {finding.mark for finding in findings}
    return 3 if "refused" in marks else 2 if "bad" in marks else 0
