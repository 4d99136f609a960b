"""The server's optimisers are torch's and Flower's, step only what a round trains, and go on with the very bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("flwr")

from flwr.serverapp.strategy import FedAdam, FedAvgM, FedYogi

from fedlora.config.sections import FederationConfig
from fedlora.errors import AdapterError
from fedlora.federation.messages import LARGEST_VALUE
from fedlora.federation.server_optimizer import ADAPTIVITY, SECOND_MOMENT_DECAY, ServerOptimizer
from tests.federation.flower_strategies import aggregated, record_of

SIZE = 12
RULES = ("momentum", "adam", "yogi")
ALL = ("none", *RULES)


def make(rule: str, rate: float = 0.05, momentum: float = 0.9) -> ServerOptimizer:
    return ServerOptimizer(
        FederationConfig(
            server_optimizer=rule,  # type: ignore[arg-type]
            server_learning_rate=rate,
            server_momentum=momentum,
        )
    )


def moves(rounds: int, seed: int = 0) -> Tensor:
    """Of all sizes, from far below τ to far above."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rounds, SIZE, generator=generator) * torch.logspace(-5, 0, SIZE)


def path(optimizer: ServerOptimizer, start: Tensor, given: Tensor) -> list[Tensor]:
    """The global vector after each round, where round t moves it by `given[t]`."""
    found = [start]
    for move in given:
        found.append(optimizer.step(found[-1], found[-1] + move))
    return found[1:]


def test_none_takes_the_very_bits() -> None:
    start, reached = torch.randn(2, SIZE)
    assert torch.equal(make("none").step(start, reached), reached)


def test_momentum_is_flowers() -> None:
    ours, theirs = make("momentum"), FedAvgM(server_learning_rate=0.05, server_momentum=0.9)
    vector = torch.randn(SIZE)
    theirs.current_arrays = record_of(vector)
    for move in moves(6):
        reached = vector + move
        vector = ours.step(vector, reached)
        assert torch.allclose(vector, aggregated(theirs, reached[None]), atol=1e-6)


def test_momentum_without_momentum_at_rate_one_is_the_aggregated_move() -> None:
    start, reached = torch.randn(2, SIZE)
    assert torch.allclose(make("momentum", rate=1.0, momentum=0.0).step(start, reached), reached, atol=1e-6)


def test_adam_is_flowers_but_for_two_details() -> None:
    """Flower's corrects as if its first round were the second, and torch's adds τ to a root that is corrected."""
    ours = make("adam")
    theirs = FedAdam(eta=0.05, beta_1=0.9, beta_2=SECOND_MOMENT_DECAY)
    vector = torch.randn(SIZE)
    for index, move in enumerate(moves(6), start=1):
        reached = vector + move
        theirs.current_arrays = {"theta": vector.numpy()}
        theirs.tau = ADAPTIVITY * (1 - SECOND_MOMENT_DECAY**index) ** 0.5
        wanted = aggregated(theirs, reached[None], server_round=index - 1)
        vector = ours.step(vector, reached)
        assert torch.allclose(vector, wanted.float(), atol=1e-5)


def test_adam_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.randn(SIZE))
    theirs = torch.optim.Adam([parameter], lr=0.05, betas=(0.9, SECOND_MOMENT_DECAY), eps=ADAPTIVITY)
    ours = make("adam")
    for move in moves(6):
        start = parameter.detach().clone()
        parameter.grad = start - (start + move)
        theirs.step()
        assert torch.equal(ours.step(start, start + move), parameter.detach())


def test_yogi_is_flowers() -> None:
    ours = make("yogi")
    theirs = FedYogi(eta=0.05, beta_1=0.9, beta_2=SECOND_MOMENT_DECAY, tau=ADAPTIVITY)
    vector = torch.randn(SIZE)
    for move in moves(6):
        reached = vector + move
        theirs.current_arrays = {"theta": vector.numpy()}
        wanted = aggregated(theirs, reached[None])
        vector = ours.step(vector, reached)
        assert torch.allclose(vector, wanted.float(), atol=1e-5)


@pytest.mark.parametrize("rule", ALL)
def test_what_a_round_does_not_train_stays_and_is_not_remembered(rule: str) -> None:
    """Two parts that take turns go the ways they would go alone, each with its own age."""
    first = torch.arange(SIZE) < 5
    both, alone, other = make(rule), make(rule), make(rule)
    start = torch.randn(SIZE)
    vector = start
    ways = {True: start[first], False: start[~first]}
    for index, move in enumerate(moves(7)):
        odd = index % 3 == 1
        moved = first if not odd else ~first
        vector = both.step(vector, vector + move, moved)
        mine = alone if not odd else other
        ways[not odd] = mine.step(ways[not odd], ways[not odd] + move[moved])
        assert torch.equal(vector[first], ways[True])
        assert torch.equal(vector[~first], ways[False])


@pytest.mark.parametrize("rule", RULES)
def test_a_part_that_always_moves_keeps_its_own_age(rule: str) -> None:
    """As a head does beside factors that take turns."""
    head = torch.arange(SIZE) >= 8
    both, alone = make(rule), make(rule)
    vector = start = torch.randn(SIZE)
    way = start[head]
    for index, move in enumerate(moves(6)):
        vector = both.step(vector, vector + move, head | (torch.arange(SIZE) % 2 == index % 2))
        way = alone.step(way, way + move[head])
        assert torch.equal(vector[head], way)


@pytest.mark.parametrize("rule", ALL)
def test_a_resumed_run_has_the_same_bits(rule: str) -> None:
    given, start = moves(6), torch.randn(SIZE)
    whole = path(make(rule), start, given)
    stopped, resumed = make(rule), make(rule)
    half = path(stopped, start, given[:3])
    kept = stopped.state()
    path(stopped, half[-1], given[3:])  # what was handed out does not change with who goes on
    resumed.restore(kept)
    assert torch.equal(torch.stack(path(resumed, half[-1], given[3:])), torch.stack(whole[3:]))
    assert torch.equal(torch.stack(half), torch.stack(whole[:3]))


def test_before_the_first_step_there_is_nothing_to_keep() -> None:
    for rule in ALL:
        assert make(rule).state() == {}
        make(rule).restore({})


@pytest.mark.parametrize("rule", RULES)
def test_a_step_leaves_what_it_is_given_alone(rule: str) -> None:
    start, reached = torch.randn(2, SIZE)
    copies: list[Any] = [start.clone(), reached.clone()]
    make(rule).step(start, reached)
    assert torch.equal(start, copies[0])
    assert torch.equal(reached, copies[1])


def test_no_step_leads_where_no_site_would_follow() -> None:
    vector = make("momentum", rate=1e4).step(torch.zeros(SIZE), torch.linspace(-1, 1, SIZE))
    assert vector.abs().max() == LARGEST_VALUE


def test_a_state_of_another_rule_or_size_is_refused() -> None:
    adam = make("adam")
    adam.step(torch.zeros(SIZE), torch.ones(SIZE))
    with pytest.raises(AdapterError, match=r"go on with the settings"):
        make("momentum").restore(adam.state())
    with pytest.raises(AdapterError, match=r"none keeps none"):
        make("none").restore(adam.state())
    with pytest.raises(AdapterError, match=r"12 coordinates and is given 3"):
        adam.step(torch.zeros(3), torch.ones(3))
