"""Runs that share a public seed, compared pair by pair."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student

CONFIDENCE = 0.95


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


def verdict(differences: Sequence[float]) -> str:
    """What the interval allows to say; accuracies come in steps, so that two seeds may agree by chance."""
    mean, half = statistics.mean(differences), half_width(differences)
    if len(differences) < 3:
        return "too few seeds"
    if abs(mean) <= half:
        return "no difference seen"
    return "gains" if mean > 0 else "loses"


def spread(values: Sequence[float]) -> float:
    """Standard deviation, 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
