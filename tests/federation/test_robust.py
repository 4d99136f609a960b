"""A few hostile clients bend the result no further than is promised, and Flower's strategies agree on the rules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("flwr")

from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, MultiKrum

from fedlora.errors import FedloraError
from fedlora.federation.robust import median, multi_krum, norm_bound, trimmed_mean
from tests.federation.flower_strategies import aggregated

Rule = Callable[[Tensor], Tensor]
RULES: dict[str, Rule] = {
    "median": median,
    "trimmed_mean": lambda moves: trimmed_mean(moves, 2),
    "multi_krum": lambda moves: multi_krum(moves, 2),
    "norm_bound": lambda moves: norm_bound(moves, None),
    "norm_bound at 1": lambda moves: norm_bound(moves, 1.0),
}
ATTACKS: dict[str, Rule] = {
    "flipped": lambda honest: -honest,
    "flipped and large": lambda honest: -100 * honest,
    "large": lambda honest: 100 * honest,
    "huge": lambda honest: torch.full_like(honest, 1e30),
    "random": lambda honest: torch.randn_like(honest) * 3,
    "nothing": torch.zeros_like,
    "another's": lambda honest: honest.roll(1, 0),
}


def random_moves(clients: int, size: int = 50, seed: int = 0) -> Tensor:
    """Noise around a common direction, as moves are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) + torch.randn(clients, size, generator=generator)


def attacked(seed: int, hostile: int, attack: str, clients: int = 10) -> tuple[Tensor, Tensor]:
    """All moves [K, P], those of hostile clients scattered among them, and the honest alone."""
    torch.manual_seed(seed)
    moves = random_moves(clients, seed=seed)
    order = torch.randperm(clients)
    moves[order[:hostile]] = ATTACKS[attack](moves[order[:hostile]])
    return moves, moves[order[hostile:].sort().values]


def assert_within(result: Tensor, honest: Tensor) -> None:
    slack = 1e-5 * honest.abs().max()
    assert (result >= honest.min(dim=0).values - slack).all()
    assert (result <= honest.max(dim=0).values + slack).all()


@pytest.mark.parametrize("clients", [1, 2, 5, 10])
def test_the_median_is_flowers(clients: int) -> None:
    moves = random_moves(clients)
    assert torch.allclose(median(moves), aggregated(FedMedian(), moves), atol=1e-6)


@pytest.mark.parametrize(("clients", "attackers"), [(3, 1), (10, 0), (10, 2), (10, 4)])
def test_the_trimmed_mean_is_flowers(clients: int, attackers: int) -> None:
    """Which is given the share of the clients to cut, and rounds it down."""
    moves = random_moves(clients)
    theirs = aggregated(FedTrimmedAvg(beta=(attackers + 0.1) / clients), moves)
    assert torch.allclose(trimmed_mean(moves, attackers), theirs, atol=1e-6)


@pytest.mark.parametrize(("clients", "attackers"), [(3, 0), (5, 1), (10, 2), (10, 3)])
@pytest.mark.parametrize("seed", range(20))
def test_multi_krum_is_flowers(clients: int, attackers: int, seed: int) -> None:
    """In two dimensions, where another number of neighbours soon makes another choice."""
    moves = random_moves(clients, size=2, seed=seed)
    theirs = MultiKrum(num_malicious_nodes=attackers, num_nodes_to_select=clients - attackers)
    assert torch.allclose(multi_krum(moves, attackers), aggregated(theirs, moves), atol=1e-6)


@given(
    rule=st.sampled_from(["median", "trimmed_mean"]),
    attack=st.sampled_from(list(ATTACKS)),
    hostile=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_each_coordinate_stays_among_the_honest(rule: str, attack: str, hostile: int, seed: int) -> None:
    moves, honest = attacked(seed, hostile, attack)
    assert_within(RULES[rule](moves), honest)


@given(attack=st.sampled_from(list(ATTACKS)), seed=st.integers(0, 1000))
def test_the_median_withstands_all_but_half(attack: str, seed: int) -> None:
    moves, honest = attacked(seed, 4, attack)
    assert_within(median(moves), honest)


@given(attack=st.sampled_from(list(ATTACKS)), hostile=st.integers(0, 2), seed=st.integers(0, 1000))
def test_multi_krum_averages_nobody_far_from_the_honest(attack: str, hostile: int, seed: int) -> None:
    """Of the 8 averaged, `hostile` may be another's, each within √6 D of an honest one, so √6 D + D of their mean."""
    moves, honest = attacked(seed, hostile, attack)
    distances = torch.cdist(honest, honest)
    farthest = float(distances.max())
    bound = farthest + hostile / 8 * (math.sqrt(6) + 1) * farthest
    assert (multi_krum(moves, 2) - honest.mean(dim=0)).norm() <= bound


@pytest.mark.parametrize("attack", ["flipped and large", "large", "huge", "random"])
def test_multi_krum_leaves_out_who_is_far_off(attack: str) -> None:
    moves, honest = attacked(0, 2, attack)
    assert torch.allclose(multi_krum(moves, 2), honest.mean(dim=0), atol=1e-6)


@given(attack=st.sampled_from(list(ATTACKS)), hostile=st.integers(0, 4), seed=st.integers(0, 1000))
def test_nobody_counts_for_more_than_the_bound(attack: str, hostile: int, seed: int) -> None:
    moves, honest = attacked(seed, hostile, attack)
    others = honest * (1.0 / honest.norm(dim=1)).clamp(max=1.0)[:, None]
    assert (norm_bound(moves, 1.0) - others.sum(dim=0) / 10).norm() <= hostile * 1.0 / 10 + 1e-5
    longest = float(honest.norm(dim=1).max())
    assert norm_bound(moves, None).norm() <= longest + 1e-4


def test_who_is_within_the_bound_is_averaged_as_is() -> None:
    moves = random_moves(4)
    assert torch.equal(norm_bound(moves, 1e3), moves.mean(dim=0))
    assert torch.equal(norm_bound(torch.zeros(3, 5), None), torch.zeros(5))


def test_of_two_the_longer_does_not_set_the_bound() -> None:
    moves = torch.tensor([[1.0, 0.0], [0.0, 1e6]])
    assert torch.allclose(norm_bound(moves, None), torch.tensor([0.5, 0.5]))


@given(rule=st.sampled_from(list(RULES)), clients=st.integers(7, 11), seed=st.integers(0, 1000), order=st.randoms())
def test_who_is_called_which_number_does_not_matter(rule: str, clients: int, seed: int, order: object) -> None:
    moves = random_moves(clients, seed=seed)
    places = list(range(clients))
    order.shuffle(places)  # type: ignore[attr-defined]
    assert torch.allclose(RULES[rule](moves), RULES[rule](moves[places]), atol=1e-5)


def test_of_equal_scores_the_first_wins() -> None:
    """Four corners of a square, which see the same distances; and of clients that all say the same, whoever."""
    corners = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    assert torch.allclose(multi_krum(corners, 1), corners[[0, 1, 2, 4]].mean(dim=0), atol=1e-6)
    assert torch.equal(multi_krum(torch.ones(5, 3), 1), torch.ones(3))


@pytest.mark.parametrize("rule", RULES)
def test_what_all_agree_on_is_taken(rule: str) -> None:
    one = random_moves(1)
    moves = one.expand(10, -1) * (0.1 if rule == "norm_bound at 1" else 1.0)
    assert torch.allclose(RULES[rule](moves), moves[0], atol=1e-6)


@pytest.mark.parametrize(("rule", "least"), [(trimmed_mean, 5), (multi_krum, 7)])
def test_too_few_for_the_promise_are_refused(rule: Callable[[Tensor, int], Tensor], least: int) -> None:
    assert rule(random_moves(least), 2).isfinite().all()
    with pytest.raises(FedloraError, match=rf"withstand 2 among at least {least} clients, but {least - 1} answered"):
        rule(random_moves(least - 1), 2)
