"""Micro-batches inside one logical batch. Sorting across logical batches would break Poisson sampling.

Public records are cut for speed. Private ones are cut so that no record can tell in another's gradient: matrix kernels
choose their order of summation by shape, so a record that lengthens or fills a micro-batch changes the rounding of all
others in it. On MiniLM in bfloat16 that moved the clipped sum of the *others* by up to 3.5 % of the clip norm, and by
several clip norms under a hostile adapter; per-record clipping then bounds nothing. In shapes that depend on a record's
own length alone, its gradient is the same to the last bit whatever its company (`engine.company` checks this on the
machine at hand).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_COLUMNS = 8


@dataclass(frozen=True)
class FixedShape:
    """Records that share a micro-batch of a fixed shape; what they do not fill is filled up with dummies."""

    positions: np.ndarray
    """Of the records among those given, int64, fewer than `rows`."""
    rows: int
    columns: int


def fixed_shapes(lengths: np.ndarray, token_budget: int, longest: int) -> Iterator[FixedShape]:
    """Cut records of `lengths` [N] into micro-batches whose shape no other record decides; nothing for N = 0.

    Columns are the length rounded up, but not beyond `longest`, which is what the model can take and no record's doing;
    rows are what fits into `token_budget` tokens of such a width, at least two. One row always stays a dummy:
    transformers leaves out an attention mask that masks nothing, which takes another kernel.
    """
    widths = np.minimum(np.maximum(-(-lengths // _COLUMNS), 1) * _COLUMNS, longest)
    for width in np.unique(widths)[::-1].tolist():  # longest first: the first one shows whether memory suffices
        positions = np.flatnonzero(widths == width)
        rows = max(2, token_budget // width)
        for start in range(0, len(positions), rows - 1):
            yield FixedShape(positions[start : start + rows - 1], rows, width)


def microbatches(lengths: np.ndarray, token_budget: int) -> Iterator[np.ndarray]:
    """Positions of public records of `lengths` [N], sorted by length so that little is padding; nothing for N = 0.

    The padded size of a group, `count * longest`, stays within `token_budget`; a single longer record makes a group.
    """
    order = np.argsort(lengths, kind="stable")[::-1]
    start = 0
    while start < len(order):
        count = max(1, token_budget // max(1, int(lengths[order[start]])))
        yield order[start : start + count]
        start += count
