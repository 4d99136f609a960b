from __future__ import annotations

import logging
import re
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlora.config.sections import FederationConfig
from fedlora.errors import ProtocolError
from fedlora.federation import robust
from fedlora.federation.aggregation import (
    TIMES_AS_LARGE,
    aggregate,
    client_weights,
    outlying,
    uniform_mean,
    weighted_mean,
)
from fedlora.federation.messages import ClientUpdate


def updates_of(vectors: Tensor, sizes: list[Any] | None = None) -> list[ClientUpdate]:
    return [
        ClientUpdate(
            run_id="r",
            round_index=0,
            phase="finetune",
            client=client,
            layout_digest="d",
            vector=vector,
            facts={} if size is None else {"num_examples": size},
        )
        for client, (vector, size) in enumerate(
            zip(vectors, sizes or [10**client for client in range(len(vectors))], strict=True)
        )
    ]


def config(**settings: Any) -> FederationConfig:
    return FederationConfig(clients=10, **settings)


def random_vectors(clients: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(clients, size, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 5), st.integers(0, 1000))
def test_the_order_of_arrival_changes_no_bit(clients: int, seed: int) -> None:
    updates = updates_of(random_vectors(clients, 33, seed))
    wanted = uniform_mean(updates)
    assert all(torch.equal(uniform_mean(order), wanted) for order in permutations(updates))


def test_everyone_weighs_the_same_whatever_it_holds() -> None:
    vectors = random_vectors(4, 20)
    assert torch.allclose(uniform_mean(updates_of(vectors)).double(), vectors.double().mean(dim=0), atol=1e-7)
    for client in range(4):
        moved = vectors.clone()
        moved[client] += 1.0
        assert torch.allclose(
            uniform_mean(updates_of(moved)) - uniform_mean(updates_of(vectors)), torch.full((20,), 0.25)
        )


def test_one_update_is_its_own_mean() -> None:
    vector = random_vectors(1, 20)
    assert torch.equal(uniform_mean(updates_of(vector)), vector[0])


def test_the_mean_of_b_times_a_is_the_mean_of_the_products() -> None:
    """What FFA-LoRA exists for: with one frozen A, averaging B averages the weight updates."""
    factor = random_vectors(8, 48, seed=1)
    vectors = random_vectors(6, 32 * 8)
    product_of_mean = uniform_mean(updates_of(vectors)).view(32, 8) @ factor
    mean_of_products = torch.stack([vector.view(32, 8) @ factor for vector in vectors]).mean(dim=0)
    assert (product_of_mean - mean_of_products).norm() <= 1e-6 * mean_of_products.norm()


AGGREGATORS = ("mean", "median", "trimmed_mean", "multi_krum", "norm_bound")
BY_SIZE = config(weights="public_size")


def test_a_mean_with_equal_weights_has_the_bits_of_the_uniform_mean() -> None:
    updates, start = updates_of(random_vectors(7, 33)), random_vectors(1, 33, seed=1)[0]
    assert torch.equal(aggregate(updates, start, config()), uniform_mean(updates))


@pytest.mark.parametrize("settings", [BY_SIZE, *(config(aggregator=name) for name in AGGREGATORS)])
def test_no_bit_of_an_aggregate_depends_on_arrival(settings: FederationConfig) -> None:
    updates, start = updates_of(random_vectors(10, 33)), random_vectors(1, 33, seed=1)[0]
    wanted = aggregate(updates, start, settings)
    for order in (updates[::-1], updates[3:] + updates[:3], updates[1::2] + updates[::2]):
        assert torch.equal(aggregate(order, start, settings), wanted)


def test_each_rule_is_used_on_the_moves_with_its_own_setting() -> None:
    vectors, start = random_vectors(10, 33), random_vectors(1, 33, seed=1)[0]
    moves = vectors - start
    cases = {
        "median": (config(aggregator="median"), robust.median(moves)),
        "auto attackers": (config(aggregator="trimmed_mean"), robust.trimmed_mean(moves, 2)),
        "attackers": (config(aggregator="trimmed_mean", attackers=4), robust.trimmed_mean(moves, 4)),
        "multi_krum": (config(aggregator="multi_krum", attackers=3), robust.multi_krum(moves, 3)),
        "auto bound": (config(aggregator="norm_bound"), robust.norm_bound(moves, None)),
        "bound": (config(aggregator="norm_bound", norm_bound=0.5), robust.norm_bound(moves, 0.5)),
    }
    for name, (settings, wanted) in cases.items():
        assert torch.equal(aggregate(updates_of(vectors), start, settings), start + wanted), name


def test_sums_over_records_are_neither_weighed_again_nor_cut_to_a_moves_length() -> None:
    sums = 100 * random_vectors(10, 33)
    updates = updates_of(sums)
    assert torch.equal(aggregate(updates, None, BY_SIZE), uniform_mean(updates))
    cut = aggregate(updates, None, config(aggregator="norm_bound", norm_bound=0.5))
    assert torch.equal(cut, robust.norm_bound(sums, None))
    assert torch.equal(aggregate(updates, None, config(aggregator="median")), robust.median(sums))


@pytest.mark.parametrize("aggregator", AGGREGATORS[1:])
@pytest.mark.parametrize("attack", ["scaled", "flipped", "random"])
def test_one_of_ten_moves_a_robust_aggregate_less_than_it_moves_the_mean(aggregator: str, attack: str) -> None:
    start, direction = random_vectors(2, 200)
    vectors = start + direction + 0.3 * random_vectors(10, 200, seed=1)
    attacked = vectors.clone()
    move = vectors[4] - start
    attacked[4] = (
        start + {"scaled": 100 * move, "flipped": -100 * move, "random": 100 * random_vectors(1, 200)[0]}[attack]
    )

    def shift(settings: FederationConfig) -> float:
        before, after = (aggregate(updates_of(given), start, settings) for given in (vectors, attacked))
        return float((after - before).norm() / (before - start).norm())

    assert shift(config(aggregator=aggregator)) < 0.25
    assert shift(config()) > 5


def test_weights_are_the_told_sizes() -> None:
    vectors = random_vectors(3, 20)
    updates = updates_of(vectors, [100, 200, 300])
    assert torch.allclose(client_weights(updates, BY_SIZE), torch.tensor([1 / 6, 1 / 3, 1 / 2], dtype=torch.float64))
    wanted = (vectors[0] + 2 * vectors[1] + 3 * vectors[2]) / 6
    assert torch.allclose(aggregate(updates, torch.zeros(20), BY_SIZE), wanted, atol=1e-6)
    assert torch.equal(client_weights(updates, config()), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_the_weighted_mean_is_flowers() -> None:
    pytest.importorskip("flwr")
    from flwr.serverapp.strategy import FedAvg

    from tests.federation.flower_strategies import aggregated

    vectors, sizes = random_vectors(5, 20), [100, 120, 150, 90, 400]
    assert torch.allclose(weighted_mean(vectors, torch.tensor(sizes)), aggregated(FedAvg(), vectors, sizes), atol=1e-6)
    updates = updates_of(vectors, sizes)
    assert torch.allclose(aggregate(updates, torch.zeros(20), BY_SIZE), aggregated(FedAvg(), vectors, sizes), atol=1e-6)


def test_equal_weights_make_the_plain_mean() -> None:
    vectors = random_vectors(6, 20)
    assert torch.allclose(weighted_mean(vectors, torch.full((6,), 3.0)), vectors.mean(dim=0), atol=1e-6)


@given(st.integers(2, 9), st.integers(0, 1000), st.integers(1, 2**63 - 1))
def test_no_claim_buys_more_than_its_bound(clients: int, seed: int, claim: int) -> None:
    sizes: list[Any] = torch.randint(1, 10**6, (clients,), generator=torch.Generator().manual_seed(seed)).tolist()
    sizes[0] = claim
    weights = client_weights(updates_of(random_vectors(clients, 2), sizes), BY_SIZE)
    assert float(weights.sum()) == pytest.approx(1)
    assert weights[0] <= TIMES_AS_LARGE / (TIMES_AS_LARGE + clients // 2) + 1e-12
    alike = client_weights(updates_of(random_vectors(clients, 2), [claim, *[500] * (clients - 1)]), BY_SIZE)
    assert alike[0] <= TIMES_AS_LARGE / (TIMES_AS_LARGE + clients - 1) + 1e-12


def test_an_absurd_claim_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        client_weights(updates_of(random_vectors(4, 2), [100, 100, 500, 100]), BY_SIZE)
        assert not caplog.records
        client_weights(updates_of(random_vectors(4, 2), [100, 100, 10**12, 100]), BY_SIZE)
    (said,) = caplog.messages
    assert said == "client 2 tells 1000000000000 records, more than 5 times the median client: it weighs as much as 500"


@pytest.mark.parametrize("size", [None, 0])
def test_who_does_not_tell_its_size_is_named_with_what_to_do(size: int | None) -> None:
    updates = updates_of(random_vectors(3, 2), [10, size, 10])
    with pytest.raises(ProtocolError, match=r"client 1 tells .*its site can make it public.*weights=uniform"):
        aggregate(updates, torch.zeros(2), BY_SIZE)
    assert aggregate(updates, torch.zeros(2), config()).isfinite().all()


def test_an_outlier_is_named_with_the_bound_that_it_broke() -> None:
    start, vectors = torch.ones(6), 1.0 + 0.01 * random_vectors(6, 6)
    assert outlying(updates_of(vectors), start, 6) == {}
    vectors[1, 5] = -10.5
    vectors[4] = 9.0
    found = outlying(updates_of(vectors), start, 6)
    assert found[1] == "a value of 10.5, beyond ±10"
    assert re.fullmatch(r"a move of length 19\.\d+, over 50 times the median client's 0\.0\d+", found[4])
    assert found.keys() == {1, 4}
    assert outlying(updates_of(vectors), start, 5).keys() == {1, 4}, "beyond P it is a far move all the same"
    assert outlying([], start, 6) == {}
