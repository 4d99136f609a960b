from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.federation.schedule import make_schedule
from fedlora.privacy.plan import FINETUNE, PROTOTYPE


def schedule_of(*overrides: str) -> tuple[Any, ...]:
    return make_schedule(RunConfig().with_overrides("federation.clients=10", "federation.rounds=20", *overrides))


def test_prototypes_come_first_and_once_from_everyone() -> None:
    first, *rest = schedule_of("federation.participation=0.3")
    assert (first.phase, first.clients, first.num_steps) == (PROTOTYPE, tuple(range(10)), 1)
    assert {entry.phase for entry in rest} == {FINETUNE}
    assert len(rest) == 20


def test_without_a_prototype_head_there_is_only_fine_tuning() -> None:
    assert {entry.phase for entry in schedule_of("model.head=trained")} == {FINETUNE}


@pytest.mark.parametrize("head", ["prototype", "frozen"])
def test_rounds_are_numbered_from_zero_without_a_gap(head: str) -> None:
    schedule = schedule_of(f"model.head={head}", "federation.local_steps=7")
    assert [entry.index for entry in schedule] == list(range(len(schedule)))
    assert {entry.num_steps for entry in schedule if entry.phase == FINETUNE} == {7}


@pytest.mark.parametrize(("participation", "size"), [(1.0, 10), (0.5, 5), (0.3, 3), (0.01, 1)])
def test_participation_decides_how_many_are_asked(participation: float, size: int) -> None:
    schedule = schedule_of("model.head=frozen", f"federation.participation={participation}")
    for entry in schedule:
        assert len(set(entry.clients)) == len(entry.clients) == size
        assert list(entry.clients) == sorted(entry.clients)
        assert set(entry.clients) <= set(range(10))


def test_cohorts_follow_from_the_public_seed_and_vary_from_round_to_round() -> None:
    options = ("model.head=frozen", "federation.participation=0.3")
    schedule = schedule_of(*options)
    assert schedule == schedule_of(*options)
    assert schedule != schedule_of(*options, "run.seed=1")
    assert len({entry.clients for entry in schedule}) > 10
    assert set(Counter(client for entry in schedule for client in entry.clients)) == set(range(10))


def test_the_linear_rate_falls_to_zero_after_the_last_round_and_the_constant_one_stays() -> None:
    linear = [entry.learning_rate for entry in schedule_of("model.head=frozen", "training.learning_rate=2")]
    assert linear[0] == 2.0
    assert linear[-1] == pytest.approx(2.0 / 20)
    steps = {round(before - after, 9) for before, after in pairwise(linear)}
    assert steps == {0.1}
    constant = schedule_of("model.head=frozen", "training.learning_rate=2", "training.schedule=constant")
    assert {entry.learning_rate for entry in constant} == {2.0}
