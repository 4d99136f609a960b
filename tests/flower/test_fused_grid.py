"""Flower's own strategies, unchanged, over the fused clients of this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedProx, MultiKrum, Strategy
from flwr.supercore.task_identity import TaskIdentity

from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.federation.cohort import Cohort
from fedlora.federation.messages import RoundInstruction
from server.fused_grid import FusedGrid
from tests.flower.cohort_run import cohort_run, tensors

UNEQUAL = ("data.partition=dirichlet", "data.dirichlet_alpha=1.0", "data.generated_records=600")
ROLORA = ("adapter.method=rolora", "model.head=trained", "training.learning_rate=0.5")
ADAM = ("model.head=trained", "training.optimizer=adam", "training.keep_state=true", "training.learning_rate=0.1")


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=atol)
    assert any(tensor.abs().max() > 0 for tensor in ours.values())


def start(strategy: Strategy, grid: FusedGrid, rounds: int | None = None) -> Any:
    return strategy.start(grid=grid, initial_arrays=grid.initial_arrays, num_rounds=rounds or grid.num_rounds)


def train_messages(grid: FusedGrid, arrays: ArrayRecord | None = None, **config: float) -> list[Message]:
    content = RecordDict(
        {"arrays": arrays or grid.initial_arrays, "config": ConfigRecord({"server-round": 1, **config})}
    )
    return [Message(content, node, "train") for node in grid.get_node_ids()]


def errors(replies: Iterable[Message]) -> list[str]:
    return [reply.error.reason for reply in replies if reply.has_error()]


@pytest.mark.parametrize(
    ("options", "strategy"),
    [((), FedAvg), (UNEQUAL, lambda: FedAvg(weighted_by_key="weight")), (ADAM, FedAvg), (ROLORA, FedAvg)],
    ids=["prototype, equal parts", "unequal parts, equal weights", "trained head, adam kept", "B and A by round"],
)
def test_fedavg_ends_with_the_cohorts_adapter_and_facts(
    config: RunConfig, options: tuple[str, ...], strategy: Callable[[], Strategy]
) -> None:
    config = config.with_overrides(*options)
    ours = cohort_run(config)
    with FusedGrid.open(config) as grid:
        result = start(strategy(), grid)
        assert_same(ours.arrays(2), tensors(result.arrays))
        assert grid.facts == ours.state.facts
    assert sorted(result.train_metrics_clientapp) == [1, 2]


def test_unequal_parts_weigh_by_their_public_sizes_where_the_strategy_wants_that(config: RunConfig) -> None:
    config = config.with_overrides(*UNEQUAL, "federation.rounds=1")
    with FusedGrid.open(config) as grid:
        replies = list(grid.send_and_receive(train_messages(grid)))
    with FusedGrid.open(config) as grid:
        result = start(FedAvg(), grid)
    sizes = [reply.content["metrics"]["num-examples"] for reply in replies]
    assert len(set(sizes)) == 3
    assert sum(sizes) == 600
    wanted = {
        name: sum(size * tensors(reply.content["arrays"])[name] for size, reply in zip(sizes, replies, strict=True))
        / 600
        for name in replies[0].content["arrays"]
    }
    assert_same(wanted, tensors(result.arrays))


def test_one_push_is_one_engine_call_and_one_release_of_class_means_comes_first(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    run = Cohort.run

    def counted(self: Cohort, instruction: RoundInstruction) -> Any:
        calls.append((instruction.phase, len(self.sites)))
        return run(self, instruction)

    monkeypatch.setattr(Cohort, "run", counted)
    with FusedGrid.open(config) as grid:
        start(FedAvg(), grid)
    assert calls == [("prototype", 3), ("finetune", 3), ("finetune", 3)]


def test_median_and_momentum_are_those_of_the_clients_noised_slots(config: RunConfig) -> None:
    with FusedGrid.open(config) as grid:
        replies = [tensors(reply.content["arrays"]) for reply in grid.send_and_receive(train_messages(grid))]
    with FusedGrid.open(config) as grid:
        median = start(FedMedian(), grid, rounds=1)
    stacked = {name: torch.stack([reply[name] for reply in replies]) for name in replies[0]}
    assert_same({name: each.median(dim=0).values for name, each in stacked.items()}, tensors(median.arrays))
    ours = cohort_run(config)
    with FusedGrid.open(config) as grid:
        momentum = start(FedAvgM(server_learning_rate=0.5), grid, rounds=1)
    assert_same({name: 0.5 * each for name, each in ours.arrays(1).items()}, tensors(momentum.arrays))


@pytest.mark.parametrize(
    "strategy",
    [FedAvgM(server_momentum=0.9), FedMedian(), FedAdam(eta=0.01), MultiKrum(num_malicious_nodes=1)],
    ids=lambda strategy: type(strategy).__name__,
)
def test_strategies_of_flowers_run_unchanged(config: RunConfig, strategy: Strategy) -> None:
    config = config.with_overrides("federation.clients=5", "federation.rounds=3", "data.generated_records=400")
    with FusedGrid.open(config) as grid:
        result = start(strategy, grid)
        assert sorted(result.train_metrics_clientapp) == sorted(result.evaluate_metrics_clientapp) == [1, 2, 3]
        spent = {client: facts["epsilon"] for client, facts in grid.facts.items()}
        assert result.train_metrics_clientapp[3]["epsilon"] == pytest.approx(max(spent.values()))
        assert max(spent.values()) <= config.privacy.epsilon
    assert all(np.isfinite(array.numpy()).all() for array in result.arrays.values())


def test_a_run_without_privacy_says_so_in_its_replies(config: RunConfig) -> None:
    config = config.with_overrides("privacy.epsilon=inf", "privacy.seeded_noise=false", "model.head=frozen")
    with FusedGrid.open(config) as grid:
        replies = list(grid.send_and_receive(train_messages(grid)))
    assert [reply.content["metrics"]["epsilon"] for reply in replies] == [float("inf")] * 3
    assert json.loads(replies[0].content["facts"]["json"])["epsilon"] == "inf"


def test_more_rounds_than_planned_are_refused_and_change_nothing(config: RunConfig) -> None:
    with FusedGrid.open(config) as grid:
        result = start(FedAvg(), grid, rounds=4)
        assert sorted(result.train_metrics_clientapp) == [1, 2]
        assert_same(cohort_run(config).arrays(2), tensors(result.arrays))
        said = errors(grid.send_and_receive(train_messages(grid)))
        assert len(said) == 3
        assert all("all 2 planned rounds of fine-tuning are done" in text for text in said)
        assert "set federation.rounds" in said[0]
        assert grid.transport.ledger.rounds(grid.first.run_id) == {0, 1, 2}


def test_who_is_left_out_misses_the_round_and_is_charged_for_it(config: RunConfig) -> None:
    with FusedGrid.open(config) as grid:
        first, *others = train_messages(grid)
        assert errors(grid.send_and_receive(others)) == []
        assert {facts["num_steps"] for facts in grid.facts.values()} == {2}
        assert grid.facts[0]["epsilon"] >= grid.facts[1]["epsilon"]
        (reply,) = grid.send_and_receive([first])
        assert json.loads(reply.content["facts"]["json"])["num_steps"] == 4
        assert [site.next_round for site in grid.sites] == [3, 2, 2], "the second round was the only one to come"
        late = errors(grid.send_and_receive(others))
        assert ["rounds of fine-tuning are done" in text for text in late] == [True] * 2


def test_nodes_are_those_of_the_public_schedule(config: RunConfig) -> None:
    config = config.with_overrides("federation.clients=4", "federation.participation=0.5", "federation.rounds=3")
    with FusedGrid.open(config) as grid:
        everyone = {site.client + 2 for site in grid.sites}
        for entry in grid.workbench.schedule[1:]:
            there = set(grid.get_node_ids())
            assert there == {client + 2 for client in entry.clients}
            absent = [Message(train_messages(grid)[0].content, node, "train") for node in sorted(everyone - there)]
            said = errors(grid.send_and_receive(absent))
            assert len(said) == 2
            assert all(f"is not in round {entry.index} of the public schedule" in text for text in said)
            assert errors(grid.send_and_receive(train_messages(grid))) == []
        assert set(grid.get_node_ids()) == everyone, "none to come, and Flower waits for ever where it finds no nodes"
        with FusedGrid.open(config) as anew:
            ours = cohort_run(config)
            assert_same(ours.arrays(3), tensors(start(FedAvg(), anew).arrays))
            assert anew.facts == ours.state.facts


def without_last(arrays: ArrayRecord) -> ArrayRecord:
    return ArrayRecord(dict(list(arrays.items())[:-1]))


def each(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ArrayRecord], ArrayRecord]:
    return lambda arrays: ArrayRecord({name: Array(change(array.numpy())) for name, array in arrays.items()})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_last, "wanted the 4 trained slots; they differ in"),
        (each(lambda array: array[..., None]), "wanted (16, 8) of float32"),
        (each(lambda array: array.astype(np.int64)), "of int64"),
        (each(lambda array: array + np.nan), "is not finite"),
        (each(lambda array: array + 11), "values beyond ±10"),
    ],
    ids=["a slot missing", "another shape", "whole numbers", "not finite", "too large"],
)
def test_arrays_that_are_no_global_state_are_refused_and_nothing_is_spent(
    config: RunConfig, change: Callable[[ArrayRecord], ArrayRecord], said: str
) -> None:
    with FusedGrid.open(config) as grid:
        texts = errors(grid.send_and_receive(train_messages(grid, change(grid.initial_arrays))))
        assert len(texts) == 3
        assert all(text.startswith("protocol: ") and said in text for text in texts), texts
        assert grid.transport.ledger.rounds(grid.first.run_id) == {0}
        assert errors(grid.send_and_receive(train_messages(grid))) == [], "the round can still be done"


def test_wishes_that_nobody_heeds_are_refused(config: RunConfig) -> None:
    with FusedGrid.open(config) as grid:
        result = start(FedProx(proximal_mu=0.1), grid)
        assert result.train_metrics_clientapp == {}
        (text, *_) = errors(grid.send_and_receive(train_messages(grid, lr=0.1)))
        assert "config has lr, which no client heeds" in text
        messages = train_messages(grid)
        moved = each(lambda array: array + 1)(grid.initial_arrays)
        messages[1].content = RecordDict({"arrays": moved})
        assert ["different arrays" in text for text in errors(grid.send_and_receive(messages))] == [True] * 3
        messages[1].content = RecordDict()
        assert "0 ArrayRecords, wanted one" in errors(grid.send_and_receive(messages))[0]
        (text,) = errors(grid.send_and_receive([Message(RecordDict(), 2, "query")]))
        assert "type query, wanted train or evaluate" in text
        twice = train_messages(grid) + train_messages(grid)
        assert ["a second message" in text for text in errors(grid.send_and_receive(twice))] == [True] * 3
        assert grid.transport.ledger.rounds(grid.first.run_id) == {0, 1}


def test_evaluation_is_on_public_records_and_the_same_for_every_node(config: RunConfig) -> None:
    with FusedGrid.open(config) as grid:
        spent = grid.transport.ledger.rounds(grid.first.run_id)
        arrays = grid.initial_arrays
        messages = [Message(RecordDict({"arrays": arrays}), node, "evaluate") for node in grid.get_node_ids()]
        found = [dict(reply.content["metrics"]) for reply in grid.send_and_receive(messages)]
        assert found[0] == found[1] == found[2]
        wanted = grid.evaluator(grid.first.theta)
        assert {name: found[0][name] for name in wanted} == pytest.approx(wanted)
        assert grid.transport.ledger.rounds(grid.first.run_id) == spent


@pytest.mark.parametrize(
    "options",
    [
        ("federation.aggregator=median",),
        ("federation.weights=public_size",),
        ("federation.server_optimizer=adam",),
        ("federation.wire_dtype=int8",),
        ("federation.private_evaluation=true",),
        ("adapter.select=random",),
        ("adapter.method=fedex",),
        ("privacy.unit=client", "model.head=frozen"),
    ],
    ids=lambda options: options[0],
)
def test_what_only_our_own_server_does_is_refused_before_anything_is_loaded(
    config: RunConfig, options: tuple[str, ...]
) -> None:
    config = config.with_overrides(*options, "model.name=/nowhere/at/all")
    with pytest.raises(ConfigError, match="FedloraStrategy"), FusedGrid.open(config):
        pass


def test_outside_a_run_messages_can_be_made_all_the_same(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower keeps who makes a message in a place of its own, which may change with its version."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with FusedGrid.open(config) as grid:
        assert grid.create_message(RecordDict(), "train", 2, "1").metadata.run_id == grid.run.run_id
    monkeypatch.setattr(TaskIdentity, "_run_id", 77)
    with FusedGrid.open(config) as grid:
        assert grid.run.run_id == 77, "inside one, it stays what it is"
