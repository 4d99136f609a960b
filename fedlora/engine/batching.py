"""Micro-batches inside one logical batch. Sorting across logical batches would break Poisson sampling.

Public records are cut for speed. Private ones are cut so that no record can tell in another's gradient: matrix kernels
choose their order of summation by shape, so a record that lengthens or fills a micro-batch changes the rounding of all
others in it. On MiniLM in bfloat16 that moved the clipped sum of the *others* by up to 3.5 % of the clip norm, and by
several clip norms under a hostile adapter; per-record clipping then bounds nothing. So a record's columns depend on its
own length alone, and its rows are a public number, or a smaller one that was seen on the machine at hand to give every
record the same bits (`engine.company`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fedlora.errors import PrivacyError

# Columns: multiples of 8, from 32 on two to an octave. Few shapes, so that a compiler or a probe meets each of them
# often, and no more than a third of a long record's row is padding.
_COLUMNS = (8, 16, 24, 32, *(columns << octave for octave in range(16) for columns in (48, 64)))
_FEWEST_ROWS = 2
_CHECKED_COLUMNS = 24
_WORTHWHILE_ROWS = 8  # of a smaller micro-batch: below, what it saves does not pay for finding out whether it agrees


@dataclass(frozen=True)
class FixedShape:
    """Records that share a micro-batch of a fixed shape; what they do not fill is filled up with dummies."""

    positions: np.ndarray
    """Of the records among those given, int64, fewer than `rows`."""
    rows: int
    columns: int


RowCounts = Callable[[int], Sequence[int]]
"""From columns to the numbers of rows that a micro-batch may have, ascending, at least 2."""


def most_rows(columns: int, token_budget: int) -> int:
    """What fits into `token_budget` tokens, at least two: one row always stays a dummy.

    transformers leaves out an attention mask that masks nothing, which takes another kernel.
    """
    return max(_FEWEST_ROWS, token_budget // columns)


def columns_of(lengths: np.ndarray, longest: int) -> np.ndarray:
    """Columns that records of `lengths` [N] take; at most `longest`, what the model can take and no record's doing."""
    ladder = np.array(_COLUMNS)
    columns: np.ndarray = np.minimum(ladder[np.searchsorted(ladder, np.maximum(lengths, 1))], longest)
    return columns


def fixed_shapes(
    lengths: np.ndarray, token_budget: int, longest: int, row_counts: RowCounts | None = None
) -> Iterator[FixedShape]:
    """Cut records of `lengths` [N] into micro-batches whose shape no other record decides; nothing for N = 0.

    Args:
        lengths: tokens of each record.
        token_budget: padded tokens of a micro-batch.
        longest: tokens that the model can take.
        row_counts: what rows may be chosen from; the most that fit by default. What is left of a width takes the
            smallest number that holds it.
    """
    columns = columns_of(lengths, longest)
    for width in np.unique(columns)[::-1].tolist():  # longest first: the first one shows whether memory suffices
        positions = np.flatnonzero(columns == width)
        counts = row_counts(width) if row_counts is not None else (most_rows(width, token_budget),)
        start = 0
        while start < len(positions):
            rows = next((count for count in counts if count > len(positions) - start), counts[-1])
            yield FixedShape(positions[start : start + rows - 1], rows, width)
            start += rows - 1


Quantity = Literal["gradients", "logits", "embeddings"]
"""What is computed of each record. Each takes kernels of its own, so that each is looked at for itself."""

AgreeingRows = Callable[[int, Sequence[int], int, Quantity], Sequence[int]]
"""From columns, numbers of rows (ascending), clients and what is computed to those numbers whose micro-batches were
seen to give each record the bits that the largest gives; none of them where even that lets a record tell in what is
computed of another."""


@dataclass(frozen=True)
class Shapes:
    """How a run's private records are cut. What is found out about the machine is remembered with it."""

    token_budget: int
    agreeing: AgreeingRows | None = field(default=None, repr=False)
    """Looks at every width before it is first used; None takes full micro-batches as they are."""
    patience: float = math.inf
    """Steps that are cut before smaller micro-batches are looked at as well: a run's first step does not wait."""
    _known: dict[tuple[Any, ...], tuple[int, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _steps: list[int] = field(default_factory=lambda: [0], init=False, repr=False, compare=False)

    def check(self, longest: int) -> None:
        """See at one width that full micro-batches have no influence, before a run spends anything.

        Raises:
            PrivacyError: they have.
        """
        columns = min(_CHECKED_COLUMNS, longest)
        rows = most_rows(columns, self.token_budget)
        if self.row_counts(columns, clients=2, expected=math.inf) != (rows,):
            raise PrivacyError(
                f"on this machine a record's gradient depends on the records beside it (micro-batches of {rows} by "
                f"{columns} tokens), so that clipping does not bound what one record changes; set "
                "engine.token_budget=1 to take records one by one, or try model.dtype=float32 or another "
                "model.attention"
            )

    def cut(
        self, lengths: np.ndarray, longest: int, *, clients: int = 1, expected: float = math.inf
    ) -> Iterator[FixedShape]:
        """Micro-batches of one step's records.

        Args:
            lengths: tokens of each record, [N].
            longest: tokens that the model can take.
            clients: K of the whole cohort, of which these may be a wave.
            expected: number of records in such a step of the whole cohort, a public one: more rows than that would stay
                empty.
        """
        self._steps[0] += 1
        fewer = self._steps[0] > self.patience
        yield from fixed_shapes(
            lengths,
            self.token_budget,
            longest,
            lambda columns: self.row_counts(columns, clients, expected, fewer=fewer),
        )

    def cut_full(self, lengths: np.ndarray, longest: int, quantity: Quantity) -> Iterator[FixedShape]:
        """Full micro-batches of records that are passed over once: no step, and not worth looking at smaller ones.

        Args:
            lengths: tokens of each record, [N].
            longest: tokens that the model can take.
            quantity: what is computed of them.
        """
        yield from fixed_shapes(
            lengths,
            self.token_budget,
            longest,
            lambda columns: self.row_counts(columns, 1, math.inf, quantity=quantity),
        )

    def row_counts(
        self, columns: int, clients: int, expected: float, *, fewer: bool = False, quantity: Quantity = "gradients"
    ) -> tuple[int, ...]:
        """Numbers of rows that micro-batches of `columns` may have, ascending, the last one whatever `fewer` says."""
        most = min(most_rows(columns, self.token_budget), max(_FEWEST_ROWS, math.ceil(min(expected, 1e9)) + 1))
        if self.agreeing is None:
            return (most,)
        smaller = [count for count in (most // 4, most // 2) if fewer and count >= _WORTHWHILE_ROWS]
        key = (columns, most, clients == 1, bool(smaller), quantity)
        if key not in self._known:
            # Where even full micro-batches let records influence one another, each record has one of its own.
            self._known[key] = tuple(self.agreeing(columns, (*smaller, most), clients, quantity)) or (_FEWEST_ROWS,)
        return self._known[key]


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
