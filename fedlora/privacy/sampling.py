"""Poisson sampling: every record enters every batch by its own coin, which is what the accountant assumes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PoissonSampler:
    """Includes each record independently with `sampling_probability`; a batch may be empty.

    The realised batch size is private. Whoever divides must divide by the public expected size.
    """

    sampling_probability: float

    def draw(self, num_examples: int, generator: np.random.Generator) -> np.ndarray:
        """Positions of one batch, int64, ascending. `generator` must be secret to the site."""
        return np.flatnonzero(generator.random(num_examples) < self.sampling_probability)
