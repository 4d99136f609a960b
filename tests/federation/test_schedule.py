from __future__ import annotations

from collections import Counter
from itertools import groupby, pairwise
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.federation.schedule import make_schedule, planned_steps
from fedlora.privacy.phases import ALIGNMENT, BILEVEL, EVALUATION, FINETUNE, PROTOTYPE, WARMUP


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


# ----------------------------------------------------------------------------------------------------------- search

ORDERS = {
    "none": [(FINETUNE, 20)],
    "all": [(FINETUNE, 20)],
    "random": [(FINETUNE, 20)],
    "probe": [(FINETUNE, 20)],
    "warmup": [(WARMUP, 3), (FINETUNE, 17)],
    "alignment": [(WARMUP, 3), (ALIGNMENT, 1), (FINETUNE, 17)],
    "bilevel": [(WARMUP, 3), (BILEVEL, 4), (FINETUNE, 13)],
}
SEARCHED = ("adapter.warmup_rounds=3", "adapter.search_rounds=4", "federation.local_steps=5")


@pytest.mark.parametrize("head", ["prototype", "frozen"])
@pytest.mark.parametrize("select", ORDERS)
def test_a_search_comes_between_prototypes_and_fine_tuning_and_takes_of_the_rounds(select: str, head: str) -> None:
    """All training together is `federation.rounds` rounds; only releases without training come on top."""
    schedule = schedule_of(
        *SEARCHED, f"adapter.select={select}", f"model.head={head}", "federation.private_evaluation=true"
    )
    ran = [(phase, len(list(entries))) for phase, entries in groupby(entry.phase for entry in schedule)]
    assert ran == [*([(PROTOTYPE, 1)] if head == "prototype" else []), *ORDERS[select], (EVALUATION, 1)]
    assert [entry.index for entry in schedule] == list(range(len(schedule)))
    for entry in schedule:
        assert entry.num_steps == (5 if entry.phase in (WARMUP, BILEVEL, FINETUNE) else 1)


def test_everyone_scores_modules_whoever_trained_and_each_is_planned_for_its_own_rounds() -> None:
    schedule = schedule_of(*SEARCHED, "adapter.select=alignment", "federation.participation=0.3", "model.head=frozen")
    (scored,) = [entry for entry in schedule if entry.phase == ALIGNMENT]
    assert scored.clients == tuple(range(10))
    for client in range(10):
        planned = planned_steps(schedule, client)
        assert planned[ALIGNMENT] == 1
        for phase in (WARMUP, FINETUNE):
            rounds = [entry for entry in schedule if entry.phase == phase and client in entry.clients]
            assert planned.get(phase, 0) == 5 * len(rounds)


def test_rates_and_cohorts_go_on_through_a_search_as_if_there_were_none() -> None:
    options = ("federation.participation=0.3", "model.head=frozen")
    plain = schedule_of(*options)
    for select in ("warmup", "alignment", "bilevel"):
        trained = [e for e in schedule_of(*SEARCHED, *options, f"adapter.select={select}") if e.phase != ALIGNMENT]
        assert [e.clients for e in trained] == [e.clients for e in plain]
        assert [e.learning_rate for e in trained] == [e.learning_rate for e in plain]
