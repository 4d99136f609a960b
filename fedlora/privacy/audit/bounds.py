"""From scores of an attack on two worlds to a lower bound on ε.

Releases made *without* a record give `without` scores, releases made *with* it give `with_record` scores. If the
mechanism is (ε, δ)-DP, every event E has P_with(E) <= e^ε P_without(E) + δ, and the same with the worlds swapped. An
event that is seen too often therefore refutes the claim; no event can ever confirm it.

The attack (which score) and its threshold are chosen on one half of the trials, and the bound is computed from the
other half only. It is valid for any scores, also with ties, and for any number of attacks and thresholds tried;
Bonferroni over thousands of thresholds would cost more than the half of the trials it saves. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

_MOST_THRESHOLDS = 1000
_CAUTION = (
    1e-3  # the largest of many noisy bounds is a lucky one; limits this strict on the first half prefer sure ones
)
Bound = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]
"""Lower bounds from counts of an event: times in the world where it is frequent, in the other, and both's trials."""
BoundMaker = Callable[[float, float], Bound]
"""Makes one from δ and the chance of error."""


@dataclass(frozen=True, kw_only=True)
class LowerBound:
    """What one audit shows about ε.

    Attributes:
        epsilon: ε is at least this, at the asked confidence; 0 says nothing.
        attack: name of the score that was chosen.
        threshold: of that score; NaN where no event was ever worth guessing on.
    """

    epsilon: float
    attack: str
    threshold: float


def clopper_pearson_lower(successes: np.ndarray, trials: int, error: float) -> np.ndarray:
    """Exact lower bound on a probability: too high with probability at most `error` (Clopper, Pearson 1934)."""
    from scipy.stats import beta

    return np.where(successes > 0, beta.ppf(error, np.maximum(successes, 1), trials - successes + 1), 0.0)


def clopper_pearson_upper(successes: np.ndarray, trials: int, error: float) -> np.ndarray:
    """Exact upper bound on a probability: too low with probability at most `error`."""
    return 1.0 - clopper_pearson_lower(trials - np.asarray(successes), trials, error)


def epsilon_bound(delta: float, error: float) -> Bound:
    """ε >= ln((p_frequent − δ) / p_rare) with Clopper-Pearson bounds, each too optimistic with probability error / 2.

    Source: Kairouz et al. 2015, theorem 2.1; as an audit, Jagielski et al. 2020, Nasr et al. 2021.
    """

    def bound(frequent: np.ndarray, rare: np.ndarray, frequent_trials: int, rare_trials: int) -> np.ndarray:
        often = clopper_pearson_lower(frequent, frequent_trials, error / 2) - delta
        rarely = clopper_pearson_upper(rare, rare_trials, error / 2)
        bounds: np.ndarray = np.log(np.maximum(often, rarely) / rarely)
        return bounds

    return bound


def gaussian_epsilon_bound(delta: float, error: float) -> Bound:
    """ε at δ of the least Gaussian mechanism that explains the counts: refutes a claimed noise multiplier sharply.

    An event of probability p in one world can have at most Φ(Φ⁻¹(p) + μ) in the other if the release is
    μ-Gaussian-DP, as any Gaussian noise on a sum is (Dong, Roth, Su 2022, theorem 2.7; as an audit, Nasr et al. 2023,
    section 4). It assumes what the claim says about the *shape* of the noise and tests its size, with few trials.
    """
    from scipy.stats import norm

    def bound(frequent: np.ndarray, rare: np.ndarray, frequent_trials: int, rare_trials: int) -> np.ndarray:
        often = clopper_pearson_lower(frequent, frequent_trials, error / 2)
        rarely = clopper_pearson_upper(rare, rare_trials, error / 2)
        shift = np.where(often > rarely, norm.ppf(often) - norm.ppf(rarely), 0.0)
        best = int(np.argmax(shift))
        bounds = np.zeros(len(shift))  # ε grows with μ, so that only the largest is worth a search
        bounds[best] = gaussian_epsilon(float(shift[best]), delta)
        return bounds

    return bound


def gaussian_epsilon(shift: float, delta: float) -> float:
    """Exact ε at δ of a Gaussian release whose worlds lie `shift` = sensitivity / σ apart.

    Source: Balle, Wang 2018, theorem 8.
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    def excess(epsilon: float) -> float:
        """δ(ε) − δ."""
        upper, lower = log_ndtr(shift / 2 - epsilon / shift), epsilon + log_ndtr(-shift / 2 - epsilon / shift)
        return float(-math.exp(upper) * math.expm1(lower - upper)) - delta

    if shift <= 0 or excess(0.0) <= 0:
        return 0.0
    # A Gaussian's loss is N(shift²/2, shift²): at its 1 − δ quantile, δ(ε) is below δ.
    highest = shift**2 / 2 + shift * math.sqrt(2 * math.log(1 / delta)) + 1.0
    return float(brentq(excess, 0.0, highest, xtol=1e-12))


def held_out_bound(
    without: Mapping[str, np.ndarray],
    with_record: Mapping[str, np.ndarray],
    make: BoundMaker,
    *,
    delta: float,
    error: float,
) -> LowerBound:
    """Choose attack, threshold and direction on the first half of the trials, bound on the second.

    Args:
        without: scores by attack, each [trials]; higher should speak for the record, but a score that speaks against it
            is found out too.
        with_record: the same for the world with the record.
        make: `epsilon_bound` or `gaussian_epsilon_bound`.
        delta: δ of the claim.
        error: chance that the bound is above the true ε, at most.
    """
    cautious = make(delta, error * _CAUTION)
    best, picked = 0.0, LowerBound(epsilon=0.0, attack=next(iter(without)), threshold=math.nan)
    event = _EVENTS[0]
    for attack in without:
        first = _first(without[attack]), _first(with_record[attack])
        thresholds = _candidates(np.concatenate(first))
        for tried in _EVENTS:
            values = _bounds(*first, thresholds, cautious, tried)
            top = int(np.argmax(values))
            if values[top] > best:
                best, event = float(values[top]), tried
                picked = LowerBound(epsilon=0.0, attack=attack, threshold=float(thresholds[top]))
    if math.isnan(picked.threshold):
        return picked
    second = _second(without[picked.attack]), _second(with_record[picked.attack])
    shown = float(_bounds(*second, np.array([picked.threshold]), make(delta, error), event)[0])
    return LowerBound(epsilon=shown, attack=picked.attack, threshold=picked.threshold)


_EVENTS = ((True, True), (False, False), (True, False), (False, True))
"""Whether the event is a score at or above the threshold, and whether it should happen more often with the record."""


def _bounds(
    without: np.ndarray, with_record: np.ndarray, thresholds: np.ndarray, bound: Bound, event: tuple[bool, bool]
) -> np.ndarray:
    """One bound per threshold."""
    above, speaks_for = event
    often, rarely = (with_record, without) if speaks_for else (without, with_record)
    counts = [np.searchsorted(np.sort(scores), thresholds) for scores in (often, rarely)]
    if above:
        counts = [len(scores) - below for scores, below in zip((often, rarely), counts, strict=True)]
    return bound(counts[0], counts[1], len(often), len(rarely))


def _candidates(scores: np.ndarray) -> np.ndarray:
    """Thresholds worth trying: values between neighbouring scores, denser in the tails, where bounds are won."""
    values = np.unique(scores)
    if len(values) > _MOST_THRESHOLDS:
        tail = np.unique(np.geomspace(1, len(values) // 2, _MOST_THRESHOLDS // 2).astype(np.int64))
        values = values[np.unique(np.concatenate([tail - 1, len(values) - tail]))]
    return np.concatenate([values[:1], (values[:-1] + values[1:]) / 2]) if len(values) else values


def _first(scores: np.ndarray) -> np.ndarray:
    return scores[: len(scores) // 2]


def _second(scores: np.ndarray) -> np.ndarray:
    return scores[len(scores) // 2 :]
