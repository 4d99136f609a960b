"""Noise as it is released by the real `train` path: right scale, normal, independent, once per logical step.

Every acceptance here has a false-alarm rate of at most 1e-6 under its null distribution; the streams are seeded, so
a pass stays a pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest
from torch import Tensor

from fedlora.adapters.slots import AdapterLayout
from fedlora.config import TrainingConfig
from fedlora.engine.batching import Shapes
from fedlora.engine.prototypes import class_sums
from fedlora.engine.training import TrainingJob, train
from fedlora.errors import ConfigError
from fedlora.federation.workbench import Workbench
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.mechanisms.gredp import GReDPMechanism
from fedlora.privacy.noise import HostNoise, NoiseSource
from fedlora.privacy.phases import FINETUNE, PROTOTYPE
from fedlora.privacy.plan import PhasePlan, make_plan
from fedlora.randomness import SecretRoot

SIGMA, CLIP, BATCH, CLIENTS, STEPS = 1.7, 0.4, 4, 4, 12
TRAINING = TrainingConfig(optimizer="sgd", expected_batch_size=BATCH)
FALSE_ALARM = 1e-6


@dataclasses.dataclass(frozen=True)
class Sabotaged(GaussianMechanism):
    """Claims `noise_multiplier` and adds `factor` times as much."""

    factor: float = 1.0

    def privatize(self, total: Tensor, *, sensitivity: float, noise: NoiseSource, slot_sizes: Sequence[int]) -> Tensor:
        return super().privatize(total, sensitivity=self.factor * sensitivity, noise=noise, slot_sizes=slot_sizes)


def has_std(values: Tensor, std: float) -> bool:
    """Two-sided exact test that independent centred normal `values` have standard deviation `std`.

    The sum of squares over std² is chi-square with len(values) degrees of freedom, so a true `std` is rejected with
    probability FALSE_ALARM = 1e-6.
    """
    statistic = float(values.double().square().sum()) / std**2
    count = values.numel()
    return bool(chi2.ppf(FALSE_ALARM / 2, count) < statistic < chi2.isf(FALSE_ALARM / 2, count))


def is_normal(values: Tensor, std: float) -> bool:
    """Kolmogorov-Smirnov against N(0, std²), false alarms 1e-6."""
    return bool(kstest(values.double().numpy().ravel() / std, "norm").pvalue > FALSE_ALARM)


def are_uncorrelated(vectors: Tensor) -> bool:
    """All pairs of rows [m, n] of independent normals: r √n is normal for large n; Bonferroni over pairs to 1e-6."""
    correlation = torch.corrcoef(vectors.double()).numpy()
    pairs = correlation[np.triu_indices(len(vectors), 1)]
    limit = chi2.isf(FALSE_ALARM / len(pairs), 1) / vectors.shape[1]
    # The normal approximation of r is conservative in its far tail for n >= 100.
    return bool((pairs**2 < limit).all())


@pytest.fixture(scope="module")
def silent_bench(make_bench: Any) -> Workbench:
    """A real model whose gradient on B is exactly zero: its prototype head has not been set."""
    return make_bench("model.head=prototype")


def make_jobs(phase: PhasePlan, round_index: int = 0) -> list[TrainingJob]:
    return [
        TrainingJob(
            records=np.arange(5 * client, 5 * client + 5),
            phase=phase,
            sampling=SecretRoot.seeded(7).numpy("sampling", client, round_index),
            noise=HostNoise(SecretRoot.seeded(7).numpy("noise", client, round_index)),
        )
        for client in range(CLIENTS)
    ]


def released_noise(bench: Workbench, dataset: Any, phase: PhasePlan, round_index: int = 0) -> Tensor:
    """[STEPS, CLIENTS, P]: how far each step moved theta at rate 1, in one call per step with the streams going on."""
    jobs = make_jobs(phase, round_index)
    rate, theta = 1.0, torch.zeros(bench.layout.size)
    moves = []
    for _ in range(STEPS):
        rows = train(
            bench.backend, dataset, jobs, theta, num_steps=1, learning_rate=rate, training=TRAINING, shapes=Shapes(16)
        )
        moves.append(torch.stack([row.theta for row in rows]))
    return torch.stack(moves)


@pytest.fixture(scope="module")
def dataset(random_records: Any) -> Any:
    return random_records([6] * 20)


def test_a_step_has_standard_deviation_rate_times_sigma_times_clip_norm_over_expected_batch_size(
    silent_bench: Workbench, dataset: Any, make_phase: Any
) -> None:
    moves = released_noise(silent_bench, dataset, make_phase(0.8, SIGMA, CLIP))
    wanted = SIGMA * CLIP / BATCH
    assert moves.numel() > 10_000
    assert has_std(moves, wanted)
    assert is_normal(moves, wanted)
    assert not has_std(moves, 0.9 * wanted)
    assert not has_std(moves, 1.1 * wanted)


@pytest.mark.parametrize("factor", [0.9, 1.1, 0.95, 1.05])
def test_a_mechanism_that_adds_less_or_more_is_caught(
    silent_bench: Workbench, dataset: Any, make_phase: Any, factor: float
) -> None:
    phase = dataclasses.replace(make_phase(0.8, SIGMA, CLIP), mechanism=Sabotaged(SIGMA, factor))
    moves = released_noise(silent_bench, dataset, phase)
    assert not has_std(moves, SIGMA * CLIP / BATCH)
    assert has_std(moves, factor * SIGMA * CLIP / BATCH)


def test_noise_scales_with_rate_and_adds_up_over_the_steps_of_a_call(
    silent_bench: Workbench, dataset: Any, make_phase: Any
) -> None:
    rows = train(
        silent_bench.backend,
        dataset,
        make_jobs(make_phase(0.8, SIGMA, CLIP), 5) * 5,  # the five copies of a client go on in one stream
        torch.zeros(silent_bench.layout.size),
        num_steps=9,
        learning_rate=0.3,
        training=TRAINING,
        shapes=Shapes(16),
    )
    moves = torch.stack([row.theta for row in rows])
    assert has_std(moves, 0.3 * math.sqrt(9) * SIGMA * CLIP / BATCH)
    assert not has_std(moves, 0.9 * 0.3 * 3 * SIGMA * CLIP / BATCH)


def test_noise_is_added_to_the_clipped_sum_of_a_real_gradient(make_bench: Any, dataset: Any, make_phase: Any) -> None:
    """The released step minus the same step without noise; every call starts at theta = 0."""
    bench = make_bench("model.head=trained")
    noisy, exact = (released_noise(bench, dataset, make_phase(0.8, sigma, CLIP)) for sigma in (SIGMA, 0.0))
    assert exact.norm() > 0.01
    assert has_std(noisy - exact, SIGMA * CLIP / BATCH)
    assert not has_std(noisy - exact, 0.9 * SIGMA * CLIP / BATCH)
    assert not has_std(noisy - exact, 1.1 * SIGMA * CLIP / BATCH)


def slots_of(layout: AdapterLayout, moves: Tensor) -> Tensor:
    """[number of slots, …]: the values of each slot over everything released."""
    return torch.stack([layout.view(moves, slot).flatten() for slot in layout.slots])


def test_noise_is_independent_between_clients_steps_rounds_and_slots(
    silent_bench: Workbench, dataset: Any, make_phase: Any
) -> None:
    phase = make_phase(0.8, SIGMA, CLIP)
    moves = torch.stack([released_noise(silent_bench, dataset, phase, index) for index in range(3)])
    every_release = moves.flatten(0, 2)  # [rounds * steps * clients, P]
    assert are_uncorrelated(every_release)
    assert are_uncorrelated(slots_of(silent_bench.layout, moves))
    assert are_uncorrelated(moves.flatten(3).permute(2, 0, 1, 3).flatten(1))  # clients over all rounds and steps
    assert not are_uncorrelated(torch.cat([every_release, every_release[:1] + 0.5 * every_release[1:2]]))
    shared = every_release.clone()
    shared[1] = 0.5 * shared[0] + 0.5 * shared[1]
    assert not are_uncorrelated(shared), "half of a neighbour's noise would be noticed"


def test_one_stream_for_two_clients_would_be_caught(silent_bench: Workbench, dataset: Any, make_phase: Any) -> None:
    jobs = make_jobs(make_phase(0.8, SIGMA, CLIP))
    jobs[1].noise = HostNoise(SecretRoot.seeded(7).numpy("noise", 0, 0))
    rows = train(
        silent_bench.backend,
        dataset,
        jobs,
        torch.zeros(silent_bench.layout.size),
        num_steps=1,
        learning_rate=1.0,
        training=TRAINING,
        shapes=Shapes(16),
    )
    assert not are_uncorrelated(torch.stack([row.theta for row in rows]))


@pytest.mark.parametrize("token_budget", [1, 24, 10_000])
def test_noise_is_drawn_once_per_logical_step_however_many_micro_batches(
    table_backend: Any, make_phase: Any, token_budget: int
) -> None:
    backend = table_backend(torch.zeros(12, 30))
    job = make_jobs(make_phase(1.0, SIGMA, CLIP))[0]
    job.records = np.arange(12)
    settings: dict[str, Any] = {"num_steps": 2, "learning_rate": 1.0, "training": TRAINING}
    moved = train(backend, backend.dataset, [job], torch.zeros(30), shapes=Shapes(token_budget), **settings)[0].theta
    assert len(backend.asked) == {1: 24, 24: 12, 10_000: 6}[token_budget]
    stream = SecretRoot.seeded(7).numpy("noise", 0, 0)
    noise = sum(torch.from_numpy(stream.standard_normal(30)).float() for _ in range(2))
    assert torch.allclose(moved, -SIGMA * CLIP / BATCH * noise, atol=1e-6)
    assert stream.random() == job.noise.generator.random()  # type: ignore[attr-defined]


@pytest.mark.parametrize("over", ["slot", "flat"])
def test_gredp_over_the_slots_of_a_real_layout_releases_its_effective_noise(
    silent_bench: Workbench, dataset: Any, make_phase: Any, over: Any
) -> None:
    phase = dataclasses.replace(make_phase(0.8, SIGMA, CLIP), mechanism=GReDPMechanism(SIGMA, "complex_half", over))
    assert silent_bench.backend.slot_sizes == tuple(slot.size for slot in silent_bench.layout.slots)
    moves = released_noise(silent_bench, dataset, phase)
    assert has_std(moves, math.sqrt(0.5) * SIGMA * CLIP / BATCH)
    assert not has_std(moves, SIGMA * CLIP / BATCH)
    assert are_uncorrelated(slots_of(silent_bench.layout, moves))


def test_noise_of_the_device_is_refused_on_the_cpu_before_anything_is_built(make_bench: Any) -> None:
    with pytest.raises(ConfigError, match=r"set engine\.noise=host"):
        make_bench("engine.noise=device")


# ------------------------------------------------------------------------------------------------- prototype release


def prototype_releases(bench: Workbench, dataset: Any, phase: PhasePlan, rounds: int) -> Tensor:
    """[rounds, C (h + 1)]: what a site releases, less the exact sums."""
    layout = bench.payload_layout(PROTOTYPE)
    sizes = [slot.size for slot in layout.slots]
    exact = class_sums(bench.classifier, dataset, np.arange(len(dataset)), layout, Shapes(1000))
    return torch.stack(
        [
            phase.privatize(exact, noise=HostNoise(SecretRoot.seeded(1).numpy("noise", 0, index)), slot_sizes=sizes)
            - exact
            for index in range(rounds)
        ]
    )


def test_the_prototype_release_has_noise_of_sigma_times_root_two(
    tiny_config: Any, silent_bench: Workbench, dataset: Any
) -> None:
    plan = make_plan(tiny_config("model.head=prototype"), num_examples=80, num_steps={FINETUNE: 2}, client=0)
    phase = plan[PROTOTYPE]
    noise = prototype_releases(silent_bench, dataset, phase, 300)
    assert has_std(noise, 20.0 * math.sqrt(2))
    assert is_normal(noise, 20.0 * math.sqrt(2))
    assert are_uncorrelated(noise.T)
    for factor in (0.9, 1.1):
        sabotaged = dataclasses.replace(phase, mechanism=Sabotaged(20.0, factor))
        assert not has_std(prototype_releases(silent_bench, dataset, sabotaged, 300), 20.0 * math.sqrt(2))
