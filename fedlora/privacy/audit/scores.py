"""What an adversary who knows the claimed noise makes of a sequence of releases. No torch."""

from __future__ import annotations

import numpy as np


def log_likelihood_ratio(released: np.ndarray, *, sampling_probability: float, noise_multiplier: float) -> np.ndarray:
    """Log of how much likelier the releases are with the record than without it, under the claimed law.

    Without it each step is N(0, σ²), with it the mixture (1 − q) N(0, σ²) + q N(1, σ²), independent over steps. No test
    tells the two worlds apart better (Neyman, Pearson 1933).

    Args:
        released: [trials, steps], the released sums along the record's direction, in units of the sensitivity.
        sampling_probability: q.
        noise_multiplier: σ > 0 along that direction.

    Returns:
        [trials].
    """
    ratio: np.ndarray = (released - 0.5) / noise_multiplier**2
    if sampling_probability < 1:
        ratio = np.logaddexp(np.log1p(-sampling_probability), np.log(sampling_probability) + ratio)
    total: np.ndarray = ratio.sum(axis=1)
    return total
