"""Cells of the tables: means over seeds, differences by seed, and what a reader has to know about them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedlora.experiments.report.results import ReportedRun, Results, clean
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
        values: metric less the baseline's, one per pair.
    """

    task: str
    label: str
    epsilon: float | None
    values: tuple[float, ...]

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
    pooled: list[tuple[float, ...]] = []
    for epsilon in results.epsilons:
        own, base = (_by_seed(results.of(task, name, epsilon)) for name in (label, results.baseline))
        values = tuple(own[seed] - base[seed] for seed in own if seed in base)
        if values:
            yield Difference(task=task, label=label, epsilon=epsilon, values=values)
        if values and math.isfinite(epsilon):
            pooled.append(values)
    if len(pooled) > 1:
        yield Difference(task=task, label=label, epsilon=None, values=tuple(v for values in pooled for v in values))


def _by_seed(runs: Sequence[ReportedRun]) -> dict[str, float]:
    """Metric by seed, the mean of those that share one."""
    grouped: dict[str, list[float]] = {}
    for run in runs:
        grouped.setdefault(run.seed, []).append(run.value)
    return {seed: statistics.fmean(values) for seed, values in grouped.items()}


def notes_of(runs: Sequence[ReportedRun]) -> list[str]:
    """What makes runs of one table less comparable, or less private, than they look."""
    return [*_comparability(runs), *_privacy(runs)]


def _comparability(runs: Sequence[ReportedRun]) -> Iterator[str]:
    codes, parts = Counter(run.code for run in runs), Counter(run.validation_part for run in runs)
    if len(codes) > 1:
        shown = ", ".join(f"{code[:12]} ({count} runs)" for code, count in sorted(codes.items()))
        yield f"Runs of {len(codes)} different versions of the code: {clean(shown)}. A difference may be the code's."
    if len(parts) > 1:
        shown = ", ".join(f"{part} ({count} runs)" for part, count in sorted(parts.items()))
        yield f"Metrics on different parts of the validation data: {clean(shown)}. They do not compare."
    elif "all" not in parts:
        yield f"Metric on one half of the validation data: data.validation_part = {clean(next(iter(parts)))}."
    names = sorted({run.metric for run in runs})
    if len(names) > 1:
        yield f"Different metrics in one table: {', '.join(names)}. They do not compare."
    places = Counter((run.label, run.epsilon, run.seed) for run in runs)
    if twice := sum(count > 1 for count in places.values()):
        yield f"{twice} places of the table have several runs of one seed, which differ in something that is no axis."


def _privacy(runs: Sequence[ReportedRun]) -> Iterator[str]:
    seeded = sum(run.record.get("noise_seeded") is True for run in runs if math.isfinite(run.epsilon))
    unsound = sum(run.guarantee is not None and run.guarantee.unsound for run in runs)
    unsaid = sum(run.guarantee is None for run in runs)
    if seeded:
        yield (
            f"{seeded} of {len(runs)} runs: noise seeded, not private. Anyone can repeat their noise; ε is what secret "
            "noise would have given."
        )
    if unsound:
        yield f"{unsound} of {len(runs)} runs: no guarantee, the mechanism releases something without noise."
    if unsaid:
        yield f"{unsaid} of {len(runs)} runs: the record states no guarantee; ε is the largest that a site reported."
