from __future__ import annotations

from itertools import permutations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapters.methods import ffa
from fedlora.federation.aggregation import uniform_mean
from fedlora.federation.messages import ClientUpdate
from fedlora.randomness import PublicSeed


def updates_of(vectors: Tensor) -> list[ClientUpdate]:
    return [
        ClientUpdate(
            run_id="r",
            round_index=0,
            phase="finetune",
            client=client,
            layout_digest="d",
            vector=vector,
            facts={"num_examples": 10**client},
        )
        for client, vector in enumerate(vectors)
    ]


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
    factor = ffa.frozen_factor(PublicSeed.from_int(0), "layer.query", 8, 48)
    vectors = random_vectors(6, 32 * 8)
    product_of_mean = uniform_mean(updates_of(vectors)).view(32, 8) @ factor
    mean_of_products = torch.stack([vector.view(32, 8) @ factor for vector in vectors]).mean(dim=0)
    assert (product_of_mean - mean_of_products).norm() <= 1e-6 * mean_of_products.norm()
