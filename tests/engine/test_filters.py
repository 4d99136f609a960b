"""Filters of noised gradients: post-processing only, the stated factors, and nothing else about a step changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from fedlora.config import TrainingConfig
from fedlora.engine.batching import Shapes
from fedlora.engine.filters import BinomialFilter, DiskFilter, DopplerFilter, JamesSteinFilter, NoFilter, make_filter
from fedlora.engine.training import TrainedRow, TrainingJob, train
from fedlora.privacy.mechanisms.mechanism import make_mechanism
from fedlora.privacy.noise import HostNoise
from fedlora.privacy.phases import FINETUNE
from fedlora.privacy.plan import PhasePlan, make_plan
from fedlora.privacy.projection import LowPass
from fedlora.randomness import SecretRoot

FILTERS = ["none", "doppler", "disk", "james_stein", "binomial"]
OPTIMIZERS = ["sgd", "momentum", "adam", "adamw"]
SIGMA, CLIP, BATCH = 1.7, 0.5, 4
FALSE_ALARM = 1e-6


def training(name: str, gain: float = 0.4, optimizer: str = "sgd") -> TrainingConfig:
    return TrainingConfig(
        noise_filter=name,  # type: ignore[arg-type]
        filter_gain=gain,
        optimizer=optimizer,  # type: ignore[arg-type]
        expected_batch_size=BATCH,
    )


def make_jobs(phase: PhasePlan, parts: Sequence[np.ndarray]) -> list[TrainingJob]:
    """Jobs with the streams that client 0, 1, … always gets, whoever trains beside it."""
    root = SecretRoot.seeded(3)
    return [
        TrainingJob(
            records=part, phase=phase, sampling=root.numpy("s", client), noise=HostNoise(root.numpy("n", client))
        )
        for client, part in enumerate(parts)
    ]


def run(
    backend: Any, jobs: Sequence[TrainingJob], theta: Tensor, how: TrainingConfig, **other: Any
) -> list[TrainedRow]:
    settings: dict[str, Any] = {"num_steps": 5, "learning_rate": 0.3, "shapes": Shapes(1000), **other}
    return train(backend, backend.dataset, jobs, theta, training=how, **settings)


@pytest.fixture
def bowl_backend(table_backend: Any) -> Any:
    """`bowl_backend(centres)`: record i's loss is ½ |D (theta - centre_i)|², so its gradient follows theta."""

    class BowlBackend(table_backend):  # type: ignore[misc]
        def __init__(self, table: Tensor, slot_sizes: tuple[int, ...] | None = None) -> None:
            super().__init__(table, slot_sizes)
            self.curvature = torch.linspace(0.2, 1.5, table.shape[1])
            self.points: list[Tensor] = []

        def gradients(self, theta: Tensor, batch: Any, labels: Any, owner: Tensor, turn: Any = None) -> list[Tensor]:
            self.points.append(theta.clone())
            records = batch["input_ids"][:, 0]
            gradients = self.curvature * (theta[owner] - self.table[records])
            return [*gradients.split(self.slot_sizes, dim=1)]

    return BowlBackend


# --------------------------------------------------------------------------------------- post-processing, nothing else


@pytest.mark.parametrize(("name", "optimizer"), [*product(FILTERS, OPTIMIZERS)])
def test_records_are_seen_through_noised_gradients_only(
    table_backend: Any, make_phase: Any, name: str, optimizer: str
) -> None:
    """Two data sets, of different sizes, whose clipped sums are equal to the bit: what leaves is equal to the bit."""
    wanted = torch.tensor([0.25, -0.125, 0.5, 0.0, 0.75, -0.25])
    few = torch.stack([wanted, torch.zeros(6)])
    many = torch.stack([0.5 * wanted, 0.25 * wanted, 0.25 * wanted, torch.full((6,), 0.5), torch.full((6,), -0.5)])
    assert torch.equal(few.sum(0), many.sum(0))
    left = []
    for table in (few, many):
        backend = table_backend(table, (4, 2))
        jobs = make_jobs(make_phase(1.0, SIGMA, 10.0), [np.arange(len(table))])
        left.append(run(backend, jobs, torch.ones(6), training(name, optimizer=optimizer))[0])
    assert torch.equal(left[0].theta, left[1].theta)
    for key, value in left[0].optimizer_state.items():
        assert value is left[1].optimizer_state[key] is None or torch.equal(value, left[1].optimizer_state[key])


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_draws_nothing_and_changes_no_charge(
    bowl_backend: Any, make_phase: Any, tiny_config: Any, name: str, untouched_global_generator: None
) -> None:
    backend = bowl_backend(torch.ones(9, 6), (4, 2))
    jobs, others = (make_jobs(make_phase(0.5, SIGMA, CLIP), [np.arange(9)]) for _ in range(2))
    run(backend, jobs, torch.zeros(6), training(name))
    run(backend, others, torch.zeros(6), training("none"))
    streams = [job.noise.generator for job in (jobs[0], others[0])]  # type: ignore[attr-defined]
    assert streams[0].random() == streams[1].random()
    assert jobs[0].sampling.random() == others[0].sampling.random()
    plans = [
        make_plan(tiny_config(f"training.noise_filter={which}"), num_examples=80, num_steps={FINETUNE: 4}, client=0)
        for which in (name, "none")
    ]
    assert plans[0] == plans[1]
    assert plans[0].epsilon() == plans[1].epsilon()


def test_a_filter_is_part_of_the_config_that_a_record_carries(tiny_config: Any) -> None:
    configs = [tiny_config(f"training.noise_filter={name}") for name in FILTERS]
    assert [config.to_mapping()["training"]["noise_filter"] for config in configs] == FILTERS
    assert len({config.digest() for config in configs}) == len(FILTERS)


# ---------------------------------------------------------------------------------- how much noise a step is left with


def has_std(values: Tensor, std: float) -> bool:
    """Two-sided exact test that independent centred normal `values` have this standard deviation; false alarms 1e-6."""
    statistic, count = float(values.double().square().sum()) / std**2, values.numel()
    return bool(chi2.ppf(FALSE_ALARM / 2, count) < statistic < chi2.isf(FALSE_ALARM / 2, count))


def step_of_noise(table_backend: Any, make_phase: Any, how: TrainingConfig, step: int) -> Tensor:
    """[P]: what SGD at rate 1 adds in step number `step` where every record's gradient is zero."""
    size = 40_000
    backend = table_backend(torch.zeros(2, size))
    rows = []
    for num_steps in (step - 1, step):
        jobs = make_jobs(make_phase(1.0, SIGMA, CLIP), [np.arange(2)])
        rows.append(run(backend, jobs, torch.zeros(size), how, num_steps=num_steps, learning_rate=1.0)[0].theta)
    return rows[1] - rows[0]


def doppler_factor(gain: float, step: int) -> float:
    """Sum of squared weights gain (1 - gain)^i, i < step, scaled to sum 1."""
    keep = 1 - gain
    return gain / (2 - gain) * (1 - keep ** (2 * step)) / (1 - keep**step) ** 2


def disk_factor(gain: float, step: int) -> float:
    """The same without the scaling: the first gradient has the weight (1 - gain)^(step - 1) that makes up for it."""
    keep = 1 - gain
    return gain / (2 - gain) * (1 - keep ** (2 * step - 2)) + keep ** (2 * step - 2)


@pytest.mark.parametrize(("name", "factor"), [("doppler", doppler_factor), ("disk", disk_factor)])
@pytest.mark.parametrize(("gain", "step"), [(0.3, 1), (0.3, 4), (0.5, 12), (0.1, 20)])
def test_a_low_pass_leaves_the_stated_share_of_a_steps_noise_variance(
    table_backend: Any, make_phase: Any, name: str, factor: Any, gain: float, step: int
) -> None:
    """In the first step all of it: a filter that made the mechanism's own noise smaller would be seen here."""
    moved = step_of_noise(table_backend, make_phase, training(name, gain), step)
    variance = factor(gain, step) * (SIGMA * CLIP / BATCH) ** 2
    assert factor(gain, 1) == pytest.approx(1.0)
    assert factor(gain, 200) == pytest.approx(gain / (2 - gain))
    assert has_std(moved, math.sqrt(variance))
    assert not has_std(moved, math.sqrt(0.9 * variance))
    assert not has_std(moved, math.sqrt(1.1 * variance))


def test_smoothing_leaves_the_stated_share_of_noise_and_mixes_no_slots() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 40_000, generator=draw)
    kept = BinomialFilter((20_000, 20_000)).refine(noise).var().item()
    assert kept == pytest.approx(70 / 256, rel=0.03)
    alone = torch.tensor([[0.0] * 6 + [1.0] + [0.0] * 6 + [5.0] * 7 + [1.0, 2.0]])
    smoothed = BinomialFilter((13, 7, 2)).refine(alone)[0]
    assert torch.allclose(smoothed[4:9] * 16, torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]))
    assert torch.equal(smoothed[13:20], torch.full((7,), 5.0)), "what is constant stays, up to a slot's ends"
    assert torch.equal(smoothed[20:], alone[0, 20:]), "too short to be smoothed"
    assert smoothed[12] == 0.0, "nothing of the next slot"


def test_james_stein_shrinks_a_slot_by_the_share_of_its_energy_that_is_noise(
    table_backend: Any, make_phase: Any
) -> None:
    """Two slots at a signal-to-noise ratio of 1 and 4, one without signal and one too small to shrink.

    At ratio 1 and n = 20,000 the factor 1/2 is estimated with a relative standard deviation of √(6 / n) / 2 = 0.9 %,
    so 5 % is over five of them: false alarms below 1e-6; a scale of the noise wrong by 10 % moves it by 19 %.
    """
    # One record far inside the clip norm; noise of std 0.5 on its mean gradient.
    clip, std, n = 1e6, 0.5, 20_000
    signal = torch.cat([torch.full((n,), std), torch.full((n,), 2 * std), torch.zeros(n), torch.full((1,), std)])
    sizes = (n, n, n, 1)
    backend = table_backend(BATCH * signal.unsqueeze(0), sizes)
    steps = []
    for name in ("none", "james_stein"):
        jobs = make_jobs(make_phase(1.0, std * BATCH / clip, clip), [np.arange(1)])
        row = run(backend, jobs, torch.zeros(len(signal)), training(name), num_steps=1, learning_rate=1.0)[0]
        steps.append(-row.theta)
    noised, refined = (step.double().split(sizes) for step in steps)
    ratios = [float(after.norm() / before.norm()) for before, after in zip(noised, refined, strict=True)]
    assert ratios[0] == pytest.approx(1 / 2, rel=0.05)
    assert ratios[1] == pytest.approx(4 / 5, rel=0.05)
    assert ratios[2] < 0.05
    assert ratios[3] == 1.0
    error = (refined[0] - signal[:n]).square().mean() / std**2
    assert error == pytest.approx(1 / 2, rel=0.05), "half of the noise's squared error, by ratio / (1 + ratio)"


@pytest.mark.parametrize(
    ("override", "factor"),
    [
        ("privacy.mechanism=gaussian", 1 / 2),
        ("privacy.low_pass=0.5", 1 / (1 + 0.5)),
        ("privacy.low_pass=0.1", 1 / (1 + 0.1)),
        ("privacy.gredp_noise=complex", 1 / 2),
        ("privacy.gredp_noise=complex_half", 1 / 2),
    ],
)
def test_james_stein_knows_how_much_noise_each_mechanism_leaves(
    table_backend: Any, tiny_config: Any, make_phase: Any, override: str, factor: float
) -> None:
    """A constant gradient as large as the noise, of which a projection keeps a share. 5 % is over five deviations."""
    clip, std, size = 1e6, 0.5, 20_000
    mechanism = ("privacy.mechanism=gredp",) if "gredp_noise" in override else ()
    privacy = tiny_config(override, *mechanism).privacy
    phase = dataclasses.replace(
        make_phase(1.0, 0.0, clip),
        mechanism=make_mechanism(privacy, std * BATCH / clip),
        projection=LowPass(privacy.low_pass) if privacy.low_pass < 1 else None,
    )
    backend, norms = table_backend(torch.full((1, size), std * BATCH)), []
    for name in ("none", "james_stein"):
        jobs = make_jobs(phase, [np.arange(1)])
        row = run(backend, jobs, torch.zeros(size), training(name), num_steps=1, learning_rate=1.0)[0]
        norms.append(float(row.theta.double().norm()))
    assert norms[1] / norms[0] == pytest.approx(factor, rel=0.05)


def test_james_stein_leaves_gradients_without_noise_and_survives_zeros() -> None:
    gradient = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(JamesSteinFilter((4,), [0.0, 0.0]).refine(gradient), gradient)
    assert torch.equal(JamesSteinFilter((4,), [1e9, 1.0]).refine(gradient), torch.zeros(2, 4))


def test_james_stein_knows_each_clients_own_noise() -> None:
    gradient = torch.full((2, 100), 1.0)
    refined = JamesSteinFilter((100,), [0.0, 0.5]).refine(gradient)
    assert torch.allclose(refined[:, 0], torch.tensor([1.0, 1 - 98 * 0.25 / 100]))


# --------------------------------------------------------------------------------------- what each filter is by formula


@pytest.mark.parametrize("name", ["doppler", "disk"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gain_one_is_no_filter_to_the_bit(bowl_backend: Any, make_phase: Any, name: str, optimizer: str) -> None:
    centres = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    rows = []
    for how in (training(name, 1.0, optimizer), training("none", 0.3, optimizer)):
        jobs = make_jobs(make_phase(0.6, SIGMA, CLIP), [np.arange(5), np.arange(5, 9)])
        rows.append(run(bowl_backend(centres), jobs, torch.zeros(6), how))
    for filtered, plain in zip(*rows, strict=True):
        assert torch.equal(filtered.theta, plain.theta)


def test_doppler_is_a_weighted_mean_of_the_gradients_so_far() -> None:
    gradients = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(1))
    filters = DopplerFilter(0.3)
    for step, gradient in enumerate(gradients, start=1):
        weights = torch.tensor([0.7 ** (step - 1 - i) for i in range(step)])
        wanted = torch.einsum("s,skp->kp", weights / weights.sum(), gradients[:step])
        assert torch.allclose(filters.refine(gradient), wanted, atol=1e-6)


def test_disk_takes_its_gradients_ahead(bowl_backend: Any, make_phase: Any) -> None:
    """Against the algorithm written out: x_t + γ d_t is where a gradient is asked for, and g_t is what moves x_t."""
    gain, rate, centre = 0.4, 0.3, torch.linspace(-1.0, 2.0, 6)
    backend = bowl_backend(centre.unsqueeze(0))
    jobs = make_jobs(make_phase(1.0, SIGMA, 10.0), [np.arange(1)])
    got = run(backend, jobs, torch.zeros(6), training("disk", gain), num_steps=6, learning_rate=rate)[0].theta
    stream = SecretRoot.seeded(3).numpy("n", 0)
    x, before, estimate, asked = np.zeros(6), np.zeros(6), None, []
    for _ in range(6):
        asked.append(x + (1 - gain) / gain * (x - before))
        noised = backend.curvature.numpy() * (asked[-1] - centre.numpy()) + SIGMA * 10.0 * stream.standard_normal(6)
        estimate = noised / BATCH if estimate is None else (1 - gain) * estimate + gain * noised / BATCH
        before, x = x, x - rate * estimate
    assert np.allclose(torch.cat(backend.points).numpy(), np.stack(asked), atol=1e-4)
    assert np.allclose(got.numpy(), x, atol=1e-4)


def test_without_noise_disk_follows_a_quadratic_without_lag_and_doppler_lags(
    bowl_backend: Any, make_phase: Any
) -> None:
    """Where the gradient is linear the look-ahead makes up for the low-pass exactly: the very path of plain SGD."""
    centres, ends = torch.linspace(-1.0, 2.0, 6).unsqueeze(0), {}
    for name in ("none", "disk", "doppler"):
        jobs = make_jobs(make_phase(1.0, 0.0, 100.0), [np.arange(1)])
        ends[name] = run(bowl_backend(centres), jobs, torch.zeros(6), training(name, 0.3), num_steps=8)[0].theta
    assert torch.allclose(ends["disk"], ends["none"], atol=1e-6)
    assert (ends["doppler"] - ends["none"]).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------ contract of them all


@pytest.mark.parametrize(("name", "optimizer"), [*product(FILTERS, OPTIMIZERS)])
def test_contract(bowl_backend: Any, make_phase: Any, name: str, optimizer: str) -> None:
    """Fused clients are separate ones, every call starts afresh, inputs are left alone, and training moves."""
    centres = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    parts, phase = [np.arange(0, 5), np.arange(5, 6), np.arange(6, 12)], make_phase(0.6, 0.3, CLIP)
    how, theta = training(name, 0.4, optimizer), torch.linspace(-1.0, 1.0, 6)

    def once(clients: Sequence[int]) -> list[TrainedRow]:
        jobs = make_jobs(phase, parts)
        return run(bowl_backend(centres, (4, 2)), [jobs[client] for client in clients], theta, how)

    fused = once([0, 1, 2])
    assert torch.equal(theta, torch.linspace(-1.0, 1.0, 6))
    for client, row in enumerate(fused):
        alone = once([client])[0]
        assert row.theta.shape == (6,)
        assert row.theta.dtype == torch.float32
        assert row.theta.isfinite().all()
        assert (row.theta - theta).norm() > 1e-3
        assert torch.allclose(row.theta, alone.theta, atol=1e-5)
    for row, again in zip(fused, once([0, 1, 2]), strict=True):
        assert torch.equal(row.theta, again.theta)


@pytest.mark.parametrize("name", FILTERS)
def test_a_broken_client_harms_nobody_else(name: str) -> None:
    filters = make_filter(training(name), slot_sizes=(3, 2), noise_std=[0.1, 0.1])
    clean = make_filter(training(name), slot_sizes=(3, 2), noise_std=[0.1, 0.1])
    theta, gradient = torch.zeros(2, 5), torch.ones(2, 5)
    broken = torch.stack([torch.full((5,), torch.nan), gradient[1]])
    for _ in range(3):
        assert torch.equal(filters.point(theta)[1], clean.point(theta)[1])
        assert torch.equal(filters.refine(broken)[1], clean.refine(gradient)[1])


def test_each_name_makes_its_filter() -> None:
    made = [make_filter(training(name), slot_sizes=(2,), noise_std=[1.0]) for name in FILTERS]
    assert [type(one) for one in made] == [NoFilter, DopplerFilter, DiskFilter, JamesSteinFilter, BinomialFilter]
