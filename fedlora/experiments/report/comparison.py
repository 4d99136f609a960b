"""Cells of the tables: means over seeds, and differences by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedlora.experiments.report.results import ReportedRun, Results
from fedlora.experiments.report.statistics import (
    FEWEST_PAIRS,
    bootstrap_interval,
    half_width,
    spread,
    verdict,
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Runs that differ by seed only."""

    task: str
    label: str
    epsilon: float
    runs: tuple[ReportedRun, ...]
    best: bool

    @property
    def values(self) -> list[float]:
        return [run.value for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Over seeds; None for a single run."""
        return spread(self.values) if len(self.runs) > 1 else None

    @property
    def half_width(self) -> float | None:
        """Of Student's interval for the mean; None where there are too few seeds for one."""
        return half_width(self.values) if len(self.runs) >= FEWEST_PAIRS else None

    def range_of(self, name: str) -> tuple[float, float] | None:
        """Least and largest of an attribute of the runs; None where no record has it."""
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
        return (min(values), max(values)) if values else None

    def mean_of(self, name: str) -> float | None:
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
        return statistics.fmean(values) if values else None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of a label to the baseline, by seed.

    Attributes:
        epsilon: at which; None for all private ones together.
        values: metric less the baseline's, one per seed; of several ε the mean over them.
        runs: that they are made of, the baseline's among them.
    """

    task: str
    label: str
    epsilon: float | None
    values: tuple[float, ...]
    runs: tuple[ReportedRun, ...]

    @property
    def enough(self) -> bool:
        return len(self.values) >= FEWEST_PAIRS

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def student(self) -> tuple[float, float]:
        half = half_width(self.values)
        return self.mean - half, self.mean + half

    @property
    def bootstrap(self) -> tuple[float, float]:
        return bootstrap_interval(self.values)

    @property
    def verdict(self) -> str:
        return verdict(self.values) if self.enough else "too few"


def cells_of(results: Results) -> list[Cell]:
    """By task, label and ε, in the order of the results; of several labels at a task and ε the best are marked."""
    grouped: dict[tuple[str, str, float], list[ReportedRun]] = {}
    for run in results.runs:
        grouped.setdefault((run.task, run.label, run.epsilon), []).append(run)
    means = {place: round(statistics.fmean(run.value for run in runs), 12) for place, runs in grouped.items()}
    rivals: dict[tuple[str, float], list[float]] = {}
    for (task, _, epsilon), mean in means.items():
        rivals.setdefault((task, epsilon), []).append(mean)
    highest = {place: max(found) for place, found in rivals.items() if len(found) > 1}
    return [
        Cell(task=t, label=name, epsilon=e, runs=tuple(runs), best=means[t, name, e] == highest.get((t, e)))
        for t in results.tasks
        for name in results.labels
        for e in results.epsilons
        if (runs := grouped.get((t, name, e)))
    ]


def differences_of(results: Results) -> list[Difference]:
    """Of every label to the baseline at each ε, and over all private ε where there are several."""
    return [
        difference
        for task in results.tasks
        for label in results.labels
        if label != results.baseline
        for difference in _of_label(results, task, label)
    ]


def _of_label(results: Results, task: str, label: str) -> Iterator[Difference]:
    private: list[dict[str, float]] = []
    runs: list[ReportedRun] = []
    for epsilon in results.epsilons:
        both = [run for name in (label, results.baseline) for run in results.of(task, name, epsilon)]
        own, base = (_by_seed([run for run in both if run.label == name]) for name in (label, results.baseline))
        values = {seed: own[seed] - base[seed] for seed in own if seed in base}
        if not values:
            continue
        paired = [run for run in both if run.seed in values]
        yield Difference(task=task, label=label, epsilon=epsilon, values=tuple(values.values()), runs=tuple(paired))
        if math.isfinite(epsilon):
            private.append(values)
            runs += paired
    if len(private) > 1:
        yield from _pooled(task, label, private, runs)


def _pooled(
    task: str, label: str, private: Sequence[Mapping[str, float]], runs: Sequence[ReportedRun]
) -> Iterator[Difference]:
    """Each seed's mean over all ε: its pairs share partition and initial values and are no independent ones.

    Args:
        private: differences by seed, for every ε. Seeds that lack one would make the mean another's.
        runs: that these are made of.
    """
    shared = [seed for seed in private[0] if all(seed in values for values in private)]
    means = tuple(statistics.fmean(values[seed] for values in private) for seed in shared)
    if means:
        own = tuple(run for run in runs if run.seed in shared)
        yield Difference(task=task, label=label, epsilon=None, values=means, runs=own)


def _by_seed(runs: Sequence[ReportedRun]) -> dict[str, float]:
    """Metric by seed, the mean of those that share one."""
    grouped: dict[str, list[float]] = {}
    for run in runs:
        grouped.setdefault(run.seed, []).append(run.value)
    return {seed: statistics.fmean(values) for seed, values in grouped.items()}
