"""One verdict over several ε: a seed counts once, however many ε it was run at."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest

from fedlora.experiments.report.comparison import Difference, differences_of
from fedlora.experiments.report.results import ReportedRun, Results

EPSILONS = (1.0, 3.0, 6.0)


def run(label: str, epsilon: float, seed: int, value: float) -> ReportedRun:
    return ReportedRun(
        folder=f"cells/{label}-{epsilon}-{seed}",
        role="cell",
        digest="d",
        task="sst2",
        label=label,
        epsilon=epsilon,
        seed=str(seed),
        metric="accuracy",
        value=value,
        spent=epsilon,
        guarantee=None,
        sigma=None,
        bytes_up=None,
        seconds=None,
        curve=(),
        unused=0,
        record={},
    )


def pooled(differences: Iterable[tuple[float, int, float]]) -> Difference | None:
    """The pooled line where "b" differs from "a" by so much at ε and seed."""
    runs = [
        run(label, epsilon, seed, 0.8 + (value if label == "b" else 0.0))
        for epsilon, seed, value in differences
        for label in ("a", "b")
    ]
    results = Results(
        runs=tuple(runs),
        axis="method",
        tasks=("sst2",),
        labels=("a", "b"),
        baseline="a",
        epsilons=tuple(sorted({found.epsilon for found in runs})),
        left=(),
        num_trials=0,
    )
    return next((found for found in differences_of(results) if found.epsilon is None), None)


def test_no_difference_is_called_one_as_seldom_as_promised_though_a_seeds_pairs_resemble_one_another() -> None:
    """5 seeds, 3 ε, correlation 0.9 and no difference: Student errs in 5 % of 3000 tables.

    That is 150 ± 11.9; 0.029 to 0.072 is left by chance less than once in a million times.
    Fifteen pairs taken for independent err in 29 %.
    """
    rng, tables, correlation = np.random.default_rng(11), 3000, 0.9
    of_seed = rng.normal(0, math.sqrt(correlation), (tables, 5, 1))
    drawn = of_seed + rng.normal(0, math.sqrt(1 - correlation), (tables, 5, len(EPSILONS)))
    alarms = 0
    for table in drawn:
        found = pooled((e, seed, table[seed, place]) for seed in range(5) for place, e in enumerate(EPSILONS))
        assert found is not None
        alarms += found.verdict != "no difference seen"
    assert 0.029 < alarms / tables < 0.072


def test_one_seed_says_nothing_at_however_many_epsilon() -> None:
    found = pooled((epsilon, 0, 0.01 + epsilon / 1000) for epsilon in EPSILONS)
    assert found is not None
    assert (len(found.values), found.verdict) == (1, "too few")


def test_only_seeds_with_a_pair_at_every_private_epsilon_are_pooled() -> None:
    values = [(1.0, seed, 0.01) for seed in range(4)] + [(6.0, seed, 0.03) for seed in range(1, 5)]
    found = pooled([*values, *((math.inf, seed, 9.0) for seed in range(5))])
    assert found is not None
    assert found.values == pytest.approx([0.02] * 3)
    assert {run.seed for run in found.runs} == {"1", "2", "3"}
    assert {run.label for run in found.runs} == {"a", "b"}


def test_seeds_that_share_no_epsilon_are_not_pooled() -> None:
    assert pooled([(1.0, 0, 0.01), (6.0, 1, 0.01)]) is None
