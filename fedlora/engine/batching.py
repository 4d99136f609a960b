"""Micro-batches inside one logical batch: sorted by length, so that little is padding.

Only the order of a sum and its rounding change; sorting across logical batches would break Poisson sampling.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def microbatches(lengths: np.ndarray, token_budget: int) -> Iterator[np.ndarray]:
    """Positions into `lengths` [N], in groups whose padded size `count * longest` stays within `token_budget`.

    A single record longer than the budget still makes a group of its own. Yields nothing for N = 0.
    """
    order = np.argsort(lengths, kind="stable")[::-1]  # longest first: the first group shows whether memory suffices
    start = 0
    while start < len(order):
        count = max(1, token_budget // max(1, int(lengths[order[start]])))
        yield order[start : start + count]
        start += count
