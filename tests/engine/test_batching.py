from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedlora.engine.batching import microbatches

LENGTHS = st.lists(st.integers(1, 200), max_size=60).map(lambda values: np.array(values, dtype=np.int64))


@given(LENGTHS, st.integers(1, 2000))
def test_every_record_is_in_exactly_one_group_within_the_budget(lengths: np.ndarray, budget: int) -> None:
    groups = list(microbatches(lengths, budget))
    assert sorted(np.concatenate([np.empty(0, np.int64), *groups]).tolist()) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * lengths[group].max() <= budget


@given(LENGTHS, st.integers(1, 2000))
def test_the_longest_come_first_and_groups_are_as_full_as_they_can_be(lengths: np.ndarray, budget: int) -> None:
    groups = list(microbatches(lengths, budget))
    longest = [int(lengths[group].max()) for group in groups]
    assert longest == sorted(longest, reverse=True)
    for group in groups[:-1]:
        assert (len(group) + 1) * lengths[group].max() > budget


def test_nothing_gives_no_group() -> None:
    assert list(microbatches(np.empty(0, np.int64), 100)) == []
