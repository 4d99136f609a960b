"""Runs that share a public seed, compared pair by pair; and the spread of those that do not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap
from scipy.stats import t as student

CONFIDENCE = 0.95
RESAMPLES = 9999
FEWEST_PAIRS = 3
"""Seeds with a pair. With fewer, nothing is said about a difference."""


def half_width(differences: Sequence[float]) -> float:
    """Of Student's interval for the mean; infinite for a single difference."""
    if len(differences) < 2:
        return math.inf
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    return quantile * spread(differences) / math.sqrt(len(differences))


def interval(differences: Sequence[float]) -> str:
    """Ends of Student's interval, as printed."""
    mean, half = statistics.mean(differences), half_width(differences)
    return f"{mean - half:+.4f} to {mean + half:+.4f}" if math.isfinite(half) else "unknown"


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Ends of the percentile bootstrap's interval for the mean, from RESAMPLES resamples under a fixed seed.

    Resamples of n values have (n - 1) / n of their variance: with few pairs the interval is too narrow. Percentiles
    and not BCa, which has no answer where all differences are the same.

    Args:
        differences: two or more.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    if spread(differences) == 0:
        return differences[0], differences[0]
    found = bootstrap(
        (np.asarray(differences, dtype=float),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def verdict(differences: Sequence[float]) -> str:
    """What the interval allows to say; accuracies come in steps, so that two seeds may agree by chance."""
    mean, half = statistics.mean(differences), half_width(differences)
    if len(differences) < FEWEST_PAIRS:
        return "too few seeds"
    if abs(mean) <= half:
        return "no difference seen"
    return "gains" if mean > 0 else "loses"


def spread(values: Sequence[float]) -> float:
    """Standard deviation, 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
