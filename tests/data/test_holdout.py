"""A record is held out, or teaches gates, for what it is, not for where it stands or beside whom."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from fedlora.data.glue import Records
from fedlora.data.holdout import gate_half, held_out
from fedlora.randomness import PublicSeed

SEED = PublicSeed.from_int(0)
Row = tuple[str, str, int]
Split = Callable[[Records, PublicSeed], np.ndarray]
SPLITS: list[Split] = [lambda records, seed: held_out(records, 0.5, seed), gate_half]
either_split = pytest.mark.parametrize("split", SPLITS, ids=["held out", "gate half"])
rows_of = st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3), st.integers(0, 1)), max_size=12)


def as_records(rows: list[Row]) -> Records:
    texts = ([first for first, _, _ in rows], [second for _, second, _ in rows])
    return Records(texts=texts, labels=np.array([label for _, _, label in rows], np.int64))


def numbered(count: int, label: int = 0, prefix: str = "") -> Records:
    return Records(texts=([f"{prefix}{i}" for i in range(count)],), labels=np.full(count, label, np.int64))


@either_split
@given(rows_of, st.randoms(use_true_random=False), st.integers(0, 12))
def test_order_and_other_records_do_not_count(split: Split, rows: list[Row], random: object, size: int) -> None:
    chosen = np.array(random.sample(range(len(rows)), min(size, len(rows))), np.int64)  # type: ignore[attr-defined]
    records = as_records(rows)
    assert np.array_equal(split(records.subset(chosen), SEED), split(records, SEED)[chosen])


@either_split
@given(rows_of)
def test_equal_records_fall_on_the_same_side(split: Split, rows: list[Row]) -> None:
    first, second = np.split(split(as_records([*rows, *rows]), SEED), 2)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_about_the_share_is_held_out(share: float) -> None:
    """Exact two-sided binomial bounds, false alarms 1e-6."""
    count = held_out(numbered(20_000), share, SEED).sum()
    assert binom.ppf(5e-7, 20_000, share) <= count <= binom.isf(5e-7, 20_000, share)


def test_about_half_teaches_gates() -> None:
    """Exact two-sided binomial bounds, false alarms 1e-6."""
    count = gate_half(numbered(20_000), SEED).sum()
    assert binom.ppf(5e-7, 20_000, 0.5) <= count <= binom.isf(5e-7, 20_000, 0.5)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_who_is_held_out_says_nothing_about_who_teaches_gates(share: float) -> None:
    """Half of the held-out records would, and half of the rest; exact binomial bounds, false alarms 1e-6 each."""
    records = numbered(20_000)
    for kept_back in (held_out(records, share, SEED), ~held_out(records, share, SEED)):
        both, among = (gate_half(records, SEED) & kept_back).sum(), kept_back.sum()
        assert binom.ppf(5e-7, among, 0.5) <= both <= binom.isf(5e-7, among, 0.5)


@either_split
@pytest.mark.parametrize("other", ["another seed", "another label", "another text"])
def test_what_decides_is_the_seed_the_label_and_the_text(split: Split, other: str) -> None:
    """Splits by different keys are independent: they share a quarter; exact binomial bounds, false alarms 1e-6."""
    first = split(numbered(20_000), SEED)
    second = {
        "another seed": split(numbered(20_000), PublicSeed.from_int(1)),
        "another label": split(numbered(20_000, label=1), SEED),
        "another text": split(numbered(20_000, prefix="x"), SEED),
    }[other]
    assert binom.ppf(5e-7, 20_000, 0.25) <= (first & second).sum() <= binom.isf(5e-7, 20_000, 0.25)


@either_split
def test_nothing_to_split(split: Split) -> None:
    assert split(numbered(0), SEED).tolist() == []
