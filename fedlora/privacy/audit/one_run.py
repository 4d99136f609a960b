"""Auditing with one training run: many canaries, each in or out by its own coin, and how well the output betrays them.

Source: Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training Run", theorem 5.2 and algorithm 1.

If the algorithm is (ε, δ)-DP for adding or removing one record, the number of right guesses among r guesses is, but for
what δ allows, no larger than a Binomial(r, e^ε / (1 + e^ε)), however the guesses were made from the output. δ may shift
it further: by at least i guesses with probability at most 2 m δ / i.

Deviations: the paper fixes the number of guesses beforehand; we try a few (`GUESSED_SHARES`) and pay for it by
Bonferroni. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

GUESSED_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
"""Shares of the canaries that are guessed, half of them as in and half as out; the rest is abstained from."""

_LARGEST_EPSILON = 100.0


@dataclass(frozen=True, kw_only=True)
class OneRunBound:
    """The best lower bound over `GUESSED_SHARES`.

    Attributes:
        epsilon: ε is at least this at the asked confidence; 0 says nothing.
        guesses: r, how many canaries were guessed.
        correct: how many of the guesses were right.
        thresholds: the score up to which a canary was guessed out, and the one from which it was guessed in.
    """

    epsilon: float
    guesses: int
    correct: int
    thresholds: tuple[float, float]


def one_run_p_value(canaries: int, guesses: int, correct: int, *, epsilon: float, delta: float) -> float:
    """Chance of at least `correct` right among `guesses`, at most, if the algorithm were (ε, δ)-DP.

    β + 2 m δ max_{i >= 1} P[v − i <= B < v] / i, with B ~ Binomial(r, e^ε / (1 + e^ε)) and β = P[B >= v].

    Args:
        canaries: m, each in with probability 1/2.
        guesses: r <= m.
        correct: v <= r.
        epsilon: ε >= 0 to be refuted.
        delta: δ of the claim.
    """
    from scipy.stats import binom

    accuracy = 1.0 / (1.0 + math.exp(-epsilon))
    at_least = binom.sf(correct - 1, guesses, accuracy)
    if correct == 0 or delta == 0:
        return float(min(1.0, at_least))
    shifts = np.arange(1, correct + 1)
    below = binom.sf(correct - shifts - 1, guesses, accuracy) - at_least
    return float(min(1.0, at_least + 2 * canaries * delta * np.max(below / shifts)))


def one_run_epsilon(canaries: int, guesses: int, correct: int, *, delta: float, error: float) -> float:
    """The largest ε that so many right guesses refute: its p-value is at most `error`; 0 if none is refuted."""
    from scipy.optimize import brentq

    def excess(epsilon: float) -> float:
        return one_run_p_value(canaries, guesses, correct, epsilon=epsilon, delta=delta) - error

    if excess(0.0) > 0:
        return 0.0
    if excess(_LARGEST_EPSILON) <= 0:
        return _LARGEST_EPSILON
    low = float(brentq(excess, 0.0, _LARGEST_EPSILON, xtol=1e-9))
    return max(0.0, low - 1e-9)


def one_run_bound(scores: np.ndarray, included: np.ndarray, *, delta: float, error: float) -> OneRunBound:
    """Guess the highest scores in and the lowest out; the best bound over a few numbers of guesses.

    Args:
        scores: [m], higher speaks for the canary's having been in; any function of what the algorithm released.
        included: [m] bool, the coins.
        delta: δ of the claim.
        error: chance that the bound is above the true ε, at most.
    """
    order = np.argsort(scores, kind="stable")
    canaries, ranked, hit = len(scores), scores[order], included[order]
    sides = sorted({max(1, round(share * canaries / 2)) for share in GUESSED_SHARES if canaries >= 2})
    found = []
    for side in sides:
        correct = int(np.sum(~hit[:side]) + np.sum(hit[canaries - side :]))
        found.append(
            OneRunBound(
                epsilon=one_run_epsilon(canaries, 2 * side, correct, delta=delta, error=error / len(sides)),
                guesses=2 * side,
                correct=correct,
                thresholds=(float(ranked[side - 1]), float(ranked[canaries - side])),
            )
        )
    return max(found, key=lambda bound: bound.epsilon)
