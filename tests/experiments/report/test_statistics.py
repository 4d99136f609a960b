"""The intervals under the tables."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.experiments.report.statistics import bootstrap_interval, half_width, interval, spread, verdict


def test_students_interval_is_the_textbooks() -> None:
    differences = (0.01, 0.02, 0.03)  # mean 0.02, s = 0.01, t(0.975, 2) = 4.302653
    assert half_width(differences) == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-6)
    assert interval(differences) == "-0.0048 to +0.0448"
    assert verdict(differences) == "no difference seen"
    assert verdict((0.01, 0.011, 0.012)) == "gains"
    assert verdict((-0.01, -0.011, -0.012)) == "loses"
    assert verdict((0.01, 0.011)) == "too few seeds"
    assert (interval((0.1,)), spread((0.1,))) == ("unknown", 0.0)


def test_the_bootstrap_is_repeatable_and_close_to_the_normal_interval_of_many_pairs() -> None:
    values = np.random.default_rng(3).normal(0.05, 0.1, 400).tolist()
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    half = 1.96 * spread(values) / 400**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)  # 10 % more or less noise would be seen
    assert (high + low) / 2 == pytest.approx(np.mean(values), abs=half / 5)


def test_the_bootstrap_of_three_pairs_is_narrower_than_students_interval() -> None:
    differences = (0.01, 0.02, 0.04)
    low, high = bootstrap_interval(differences)
    assert high - low < half_width(differences)
    assert min(differences) <= low <= high <= max(differences)


def test_equal_differences_have_an_interval_of_no_width() -> None:
    assert bootstrap_interval((0.5, 0.5, 0.5)) == (0.5, 0.5)
