"""Batches are really Poisson: every record by its own coin. Tests that a shuffled fixed-size batch must fail.

All acceptance tests have a false-alarm rate of at most 1e-6 under Poisson sampling; streams are seeded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, chi2

from fedlora.config import TrainingConfig
from fedlora.engine.batching import Shapes
from fedlora.engine.training import TrainingJob, train
from fedlora.privacy.noise import HostNoise
from fedlora.privacy.sampling import PoissonSampler
from fedlora.randomness import SecretRoot

FALSE_ALARM = 1e-6
N, Q, DRAWS = 60, 0.15, 3000
Draw = Callable[[np.random.Generator], np.ndarray]


def inclusion(draw: Draw, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Boolean [draws, N]: who was in which batch."""
    generator = SecretRoot.seeded(seed).numpy("sampling")
    included = np.zeros((draws, N), dtype=bool)
    for row in included:
        row[draw(generator)] = True
    return included


def within_binomial(counts: np.ndarray, trials: int, probability: float) -> bool:
    """All `counts` within exact two-sided binomial bounds, Bonferroni over them."""
    tail = FALSE_ALARM / np.size(counts) / 2
    low, high = binom.ppf(tail, trials, probability), binom.isf(tail, trials, probability)
    return bool(((counts >= low) & (counts <= high)).all())


def right_frequency(included: np.ndarray, probability: float) -> bool:
    """Every record, and all together."""
    return within_binomial(included.sum(axis=0), len(included), probability) and within_binomial(
        np.array([included.sum()]), included.size, probability
    )


def right_pairs(included: np.ndarray, probability: float) -> bool:
    """How often two records meet in a batch, for every pair, as for independent coins."""
    together = included.T.astype(np.int64) @ included
    return within_binomial(together[np.triu_indices(N, 1)], len(included), probability**2)


def right_sizes(included: np.ndarray, probability: float) -> bool:
    """Variance of the batch size: (S - 1) * sample variance / n q (1 - q) is chi-square (binomial sizes are normal)."""
    sizes = included.sum(axis=1)
    statistic = (len(sizes) - 1) * sizes.var(ddof=1) / (N * probability * (1 - probability))
    degrees = len(sizes) - 1
    return bool(chi2.ppf(FALSE_ALARM / 2, degrees) < statistic < chi2.isf(FALSE_ALARM / 2, degrees))


def poisson(probability: float) -> Draw:
    return lambda generator: PoissonSampler(probability).draw(N, generator)


def test_every_record_is_included_with_the_sampling_probability() -> None:
    included = inclusion(poisson(Q))
    assert right_frequency(included, Q)
    assert not right_frequency(inclusion(poisson(0.9 * Q)), Q)
    assert not right_frequency(inclusion(poisson(1.1 * Q)), Q)


def test_records_are_included_independently() -> None:
    assert right_pairs(inclusion(poisson(Q)), Q)

    def in_blocks_of_two(generator: np.random.Generator) -> np.ndarray:
        return np.flatnonzero(np.repeat(generator.random(N // 2) < Q, 2))

    assert right_frequency(inclusion(in_blocks_of_two), Q)
    assert not right_pairs(inclusion(in_blocks_of_two), Q)


def test_batch_sizes_vary_as_they_must_and_a_fixed_size_is_caught() -> None:
    def shuffled_fixed_size(generator: np.random.Generator) -> np.ndarray:
        return generator.permutation(N)[: round(Q * N)]

    included = inclusion(poisson(Q))
    assert right_sizes(included, Q)
    assert len(np.unique(included.sum(axis=1))) > 10
    assert right_frequency(inclusion(shuffled_fixed_size), Q), "a frequency alone does not tell them apart"
    assert not right_sizes(inclusion(shuffled_fixed_size), Q)


def test_successive_batches_are_independent() -> None:
    included = inclusion(poisson(Q))
    again = (included[1:] & included[:-1]).sum(axis=0)
    # Overlapping pairs of draws: even and odd ones apart are each binomial.
    for start in (0, 1):
        first, second = included[start:-1:2], included[start + 1 :: 2]
        assert within_binomial((first & second).sum(axis=0), len(second), Q**2)
    assert again.sum() > 0


def test_probability_one_takes_everyone_and_no_records_give_no_batch() -> None:
    generator = SecretRoot.seeded(0).numpy("x")
    assert PoissonSampler(1.0).draw(1000, generator).tolist() == list(range(1000))
    assert PoissonSampler(0.5).draw(0, generator).shape == (0,)


def test_positions_are_ascending_unique_int64_and_a_batch_may_be_empty() -> None:
    generator = SecretRoot.seeded(0).numpy("x")
    sizes = set()
    for _ in range(200):
        drawn = PoissonSampler(0.02).draw(N, generator)
        assert drawn.dtype == np.int64
        assert (np.diff(drawn) > 0).all()
        sizes.add(len(drawn))
    assert 0 in sizes


# ------------------------------------------------------------------------------------------------ in the real training


def batches_of(table_backend: Any, phase: Any, parts: list[np.ndarray], num_steps: int, token_budget: int) -> Any:
    """Boolean [clients, steps, n]: which records `train` asked gradients of, one call per step."""
    import torch

    backend = table_backend(torch.zeros(sum(map(len, parts)), 1))
    jobs = [
        TrainingJob(
            records=part,
            phase=phase,
            sampling=SecretRoot.seeded(3).numpy("sampling", client),
            noise=HostNoise(SecretRoot.seeded(3).numpy("noise", client)),
        )
        for client, part in enumerate(parts)
    ]
    included = np.zeros((len(parts), num_steps, N), dtype=np.int64)
    for step in range(num_steps):
        backend.asked.clear()
        train(
            backend,
            backend.dataset,
            jobs,
            torch.zeros(1),
            num_steps=1,
            learning_rate=1.0,
            training=TrainingConfig(expected_batch_size=9),
            shapes=Shapes(token_budget),
        )
        for records, owners in backend.asked:
            for record, owner in zip(records, owners, strict=True):
                assert record in parts[owner], "a record was trained for a client that does not own it"
                included[owner, step, record - parts[owner][0]] += 1
    return included


@pytest.mark.parametrize("token_budget", [3, 10_000])
def test_training_asks_for_poisson_batches_of_each_clients_own_records(
    table_backend: Any, make_phase: Any, token_budget: int
) -> None:
    parts = [np.arange(0, N), np.arange(N, 2 * N)]
    included = batches_of(table_backend, make_phase(Q, 0.0), parts, 800, token_budget)
    assert included.max() == 1, "a record is asked for at most once per step"
    for client in range(2):
        own = included[client].astype(bool)
        assert right_frequency(own, Q)
        assert right_pairs(own, Q)
        assert right_sizes(own, Q)
    both = (included[0] & included[1]).sum(axis=0)
    assert within_binomial(both, 800, Q**2), "clients draw independently"
