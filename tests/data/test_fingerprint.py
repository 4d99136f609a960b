"""A fingerprint names a multiset of records."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.fingerprint import fingerprint
from fedlora.data.glue import Records

Row = tuple[str, str, int]
rows_of = st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3), st.integers(0, 1)), max_size=6)


def as_records(rows: list[Row]) -> Records:
    texts = ([first for first, _, _ in rows], [second for _, second, _ in rows])
    return Records(texts=texts, labels=np.array([label for _, _, label in rows], np.int64))


@given(rows_of, rows_of)
def test_equal_exactly_when_the_multisets_are(first: list[Row], second: list[Row]) -> None:
    same = fingerprint(as_records(first)) == fingerprint(as_records(second))
    assert same == (sorted(first) == sorted(second))


@given(rows_of, st.randoms(use_true_random=False))
def test_order_does_not_count(rows: list[Row], random: st.random.Random) -> None:
    shuffled = random.sample(rows, len(rows))
    assert fingerprint(as_records(rows)) == fingerprint(as_records(shuffled))


def test_any_change_counts() -> None:
    base = [("ab", "c", 0), ("x", "y", 1)]
    changed = [
        [("a", "bc", 0), ("x", "y", 1)],  # a letter moves to the neighbouring text
        [("ab", "c", 1), ("x", "y", 1)],
        [("ab", "c ", 0), ("x", "y", 1)],
        [("ab", "c", 0)],
        [*base, base[0]],
        [*base, base[0], base[0]],
    ]
    digests = {fingerprint(as_records(rows)) for rows in [base, *changed]}
    assert len(digests) == 7
    assert all(len(digest) == 64 for digest in digests)


def test_a_part_has_its_own_fingerprint() -> None:
    records = as_records([("a", "b", 0), ("c", "d", 1), ("e", "f", 0)])
    assert fingerprint(records.subset(np.array([2, 0]))) == fingerprint(records.subset(np.array([0, 2])))
    assert fingerprint(records.subset(np.array([0]))) != fingerprint(records)
