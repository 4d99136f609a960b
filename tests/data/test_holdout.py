"""A record is held out for what it is, not for where it stands or beside whom."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from fedlora.data.glue import Records
from fedlora.data.holdout import held_out
from fedlora.randomness import PublicSeed

SEED = PublicSeed.from_int(0)
Row = tuple[str, str, int]
rows_of = st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3), st.integers(0, 1)), max_size=12)


def as_records(rows: list[Row]) -> Records:
    texts = ([first for first, _, _ in rows], [second for _, second, _ in rows])
    return Records(texts=texts, labels=np.array([label for _, _, label in rows], np.int64))


def numbered(count: int, label: int = 0, prefix: str = "") -> Records:
    return Records(texts=([f"{prefix}{i}" for i in range(count)],), labels=np.full(count, label, np.int64))


@given(rows_of, st.randoms(use_true_random=False), st.integers(0, 12))
def test_order_and_other_records_do_not_count(rows: list[Row], random: object, size: int) -> None:
    chosen = np.array(random.sample(range(len(rows)), min(size, len(rows))), np.int64)  # type: ignore[attr-defined]
    records = as_records(rows)
    assert np.array_equal(held_out(records.subset(chosen), 0.5, SEED), held_out(records, 0.5, SEED)[chosen])


@given(rows_of)
def test_equal_records_fall_on_the_same_side(rows: list[Row]) -> None:
    first, second = np.split(held_out(as_records([*rows, *rows]), 0.5, SEED), 2)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_about_the_share_is_held_out(share: float) -> None:
    """Exact two-sided binomial bounds, false alarms 1e-6."""
    count = held_out(numbered(20_000), share, SEED).sum()
    assert binom.ppf(5e-7, 20_000, share) <= count <= binom.isf(5e-7, 20_000, share)


@pytest.mark.parametrize("other", ["another seed", "another label", "another text"])
def test_what_decides_is_the_seed_the_label_and_the_text(other: str) -> None:
    """Splits by different keys are independent: they share a quarter; exact binomial bounds, false alarms 1e-6."""
    first = held_out(numbered(20_000), 0.5, SEED)
    second = {
        "another seed": held_out(numbered(20_000), 0.5, PublicSeed.from_int(1)),
        "another label": held_out(numbered(20_000, label=1), 0.5, SEED),
        "another text": held_out(numbered(20_000, prefix="x"), 0.5, SEED),
    }[other]
    assert binom.ppf(5e-7, 20_000, 0.25) <= (first & second).sum() <= binom.isf(5e-7, 20_000, 0.25)


def test_nothing_to_hold_out() -> None:
    assert held_out(numbered(0), 0.5, SEED).tolist() == []
