"""What an audit saw, what it concludes, and how sure it is. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedlora.privacy.audit.bounds import epsilon_bound, gaussian_epsilon_bound, held_out_bound
from fedlora.privacy.audit.one_run import OneRunBound, one_run_bound

ERROR = 0.05
"""Chance that a sound mechanism is contradicted anywhere in one audit, at most."""

Method = Literal["events", "gaussian", "one run"]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Scores of an attack on one released thing, beside what is claimed of it.

    Attributes:
        level: "mechanism" (crafted gradients, many trials) or "training" (canaries in one run).
        name: what was audited.
        claimed: ε that the accountant gives for exactly this.
        delta: δ of the claim.
        without: scores by attack where the record was out, each [trials].
        with_record: scores by attack where it was in, each [trials].
        method: which bound applies: `epsilon_bound`, `gaussian_epsilon_bound` or `one_run_bound`.
    """

    level: str
    name: str
    claimed: float
    delta: float
    without: Mapping[str, np.ndarray]
    with_record: Mapping[str, np.ndarray]
    method: Method = "events"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Evidence and the lower bound on ε that follows from it.

    Attributes:
        evidence: what was seen.
        bound: the true ε is at least this, at `confidence`.
        confidence: of this bound alone; that of all findings of an audit together is 1 − `ERROR`.
        attack: name of the score that was used.
        thresholds: of that score: one, or for one run the two between which nothing was guessed; empty for none.
    """

    evidence: Evidence
    bound: float
    confidence: float
    attack: str
    thresholds: tuple[float, ...]

    @property
    def contradicts(self) -> bool:
        """Whether the claim is refuted. That it is not proves nothing."""
        return self.bound > self.evidence.claimed

    @property
    def verdict(self) -> str:
        if self.contradicts:
            return "contradicted"
        return "no claim" if math.isinf(self.evidence.claimed) else "consistent"


def judge(evidence: Sequence[Evidence], *, error: float | None = None) -> list[Finding]:
    """A lower bound for each; the error is divided among them (Bonferroni), so that a long table cries no more wolf.

    Args:
        evidence: one part for each row.
        error: of each row, where the table has rows of other kinds as well; None divides `ERROR` among these.
    """
    share = ERROR / len(evidence) if error is None else error
    return [_judge(part, share) for part in evidence]


def _judge(evidence: Evidence, error: float) -> Finding:
    thresholds: tuple[float, ...]
    if evidence.method == "one run":
        runs = {attack: _one_run(evidence, attack, error / len(evidence.without)) for attack in evidence.without}
        attack = max(runs, key=lambda name: runs[name].epsilon)
        bound, thresholds = runs[attack].epsilon, runs[attack].thresholds
    else:
        make = gaussian_epsilon_bound if evidence.method == "gaussian" else epsilon_bound
        found = held_out_bound(evidence.without, evidence.with_record, make, delta=evidence.delta, error=error)
        attack, bound = found.attack, found.epsilon
        thresholds = () if math.isnan(found.threshold) else (found.threshold,)
    return Finding(evidence=evidence, bound=bound, confidence=1 - error, attack=attack, thresholds=thresholds)


def _one_run(evidence: Evidence, attack: str, error: float) -> OneRunBound:
    out, inside = evidence.without[attack], evidence.with_record[attack]
    coins = np.repeat([False, True], [len(out), len(inside)])
    return one_run_bound(np.concatenate([out, inside]), coins, delta=evidence.delta, error=error)
