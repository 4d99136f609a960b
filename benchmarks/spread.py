"""Turns in random order, and what is said about them: smallest, median and largest, never a mean."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of a few measurements."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = sorted(values)
        return cls(found[0], statistics.median(found), found[-1])

    def to_json(self) -> dict[str, float]:
        return {"min": round(self.low, 4), "median": round(self.median, 4), "max": round(self.high, 4)}

    def __str__(self) -> str:
        return f"{self.low:.2f} / **{self.median:.2f}** / {self.high:.2f}"


def ratios(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """Of each turn's value to the same turn's reference: what disturbs one turn disturbs both."""
    return Spread.of(value / base for value, base in zip(values, reference, strict=True))


def take_turns(tasks: Mapping[str, Callable[[], Any]], turns: int, order: random.Random) -> dict[str, list[Any]]:
    """Results of every task by name, one per turn; each turn runs all tasks once, in an order of its own."""
    results: dict[str, list[Any]] = {name: [] for name in tasks}
    for _ in range(turns):
        for name in order.sample(list(tasks), len(tasks)):
            results[name].append(tasks[name]())
    return results
