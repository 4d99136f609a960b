"""The low-pass is an orthogonal projection that no data decides, before the clip and after the noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from fedlora.config import RunConfig, TrainingConfig
from fedlora.engine.batching import Shapes
from fedlora.engine.training import TrainingJob, train
from fedlora.errors import PrivacyError
from fedlora.privacy.clipping import Clipping
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.noise import HostNoise
from fedlora.privacy.phases import FINETUNE, PROTOTYPE
from fedlora.privacy.plan import PhasePlan, make_plan
from fedlora.privacy.projection import LowPass
from fedlora.privacy.sampling import PoissonSampler
from fedlora.randomness import SecretRoot

SIGMA, CLIP = 1.7, 0.4
SLOTS = (30, 25, 1)
SIZES, SHARES = (1, 2, 3, 8, 9, 64), (0.1, 0.5, 0.9)


def matrix(low_pass: LowPass, size: int) -> Tensor:
    """[size, size] float64 of the projection."""
    return low_pass(torch.eye(size, dtype=torch.float64)).T


def make_phase(share: float | None, sigma: float = SIGMA) -> PhasePlan:
    return PhasePlan(
        name=FINETUNE,
        sampler=PoissonSampler(1.0),
        clipping=Clipping("flat", CLIP),
        mechanism=GaussianMechanism(sigma),
        num_steps=1,
        projection=None if share is None else LowPass(share),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", SHARES)
def test_it_is_an_orthogonal_projection_onto_the_low_frequencies(size: int, share: float) -> None:
    """Linear, so its matrix says all: idempotent, symmetric, and of the rank that the kept bins stand for."""
    low_pass = LowPass(share)
    projection = matrix(low_pass, size)
    values = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    assert torch.allclose(low_pass(values), values @ projection.T, atol=1e-12)
    assert torch.allclose(projection @ projection, projection, atol=1e-12)
    assert torch.allclose(projection, projection.T, atol=1e-12)
    kept = math.ceil(share * (size // 2 + 1))
    frequencies = np.minimum(np.arange(size), size - np.arange(size))  # of each of the n coefficients, n - k with k
    assert round(float(projection.trace())) == (frequencies < kept).sum()
    spectrum = np.fft.fft(low_pass(values).numpy())
    assert np.abs(spectrum[:, frequencies >= kept]).max(initial=0) < 1e-12
    assert np.allclose(spectrum[:, frequencies < kept], np.fft.fft(values.numpy())[:, frequencies < kept])


@pytest.mark.parametrize("share", SHARES)
def test_norms_never_grow_and_rows_do_not_mix(share: float) -> None:
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    projected = LowPass(share)(rows)
    assert (projected.norm(dim=1) <= rows.norm(dim=1) * (1 + 1e-6)).all()
    rows[2, 5] = torch.nan
    again = LowPass(share)(rows)
    keep = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(again[keep], projected[keep])
    assert not torch.isfinite(again[2]).any()


def test_a_share_of_one_computes_nothing() -> None:
    values = torch.randn(8)
    assert LowPass(1.0)(values) is values
    configs = [RunConfig().with_overrides(f"privacy.low_pass={share}") for share in (1, 0.25)]
    plans = [make_plan(config, num_examples=2000, num_steps={FINETUNE: 10}, client=0) for config in configs]
    assert [plan[FINETUNE].projection for plan in plans] == [None, LowPass(0.25)]
    assert plans[1][PROTOTYPE].projection is None
    assert plans[0][FINETUNE].charge() == plans[1][FINETUNE].charge(), "a projection is free"


def step(table_backend: Any, table: Tensor, phase: PhasePlan, stream: int = 0) -> Tensor:
    """[P]: the released sum of one step of the real training, in which every record of `table` takes part."""
    backend, secret = table_backend(table, SLOTS), SecretRoot.seeded(stream)
    job = TrainingJob(
        records=np.arange(len(table)),
        phase=phase,
        sampling=secret.numpy("sampling"),
        noise=HostNoise(secret.numpy("noise")),
    )
    row = train(
        backend,
        backend.dataset,
        [job],
        torch.zeros(sum(SLOTS)),
        num_steps=1,
        learning_rate=1.0,
        training=TrainingConfig(optimizer="sgd", expected_batch_size=1),
        shapes=Shapes(100),
    )[0]
    return -row.theta


def test_records_are_projected_before_they_are_clipped(table_backend: Any) -> None:
    low_pass = LowPass(0.3)
    rows = torch.randn(1, sum(SLOTS), generator=torch.Generator().manual_seed(0))
    low = low_pass.of_slots(rows[0], SLOTS)
    high = rows[0] - low
    shortened = 0.9 * CLIP * low / low.norm()
    table = (shortened + 100 * high).unsqueeze(0)
    assert torch.allclose(step(table_backend, table, make_phase(0.3, 0.0)), shortened, atol=1e-4)
    assert step(table_backend, table, make_phase(None, 0.0)).norm() == pytest.approx(CLIP, rel=1e-4)
    assert step(table_backend, 100 * low.unsqueeze(0), make_phase(0.3, 0.0)).norm() == pytest.approx(CLIP, rel=1e-4)
    assert step(table_backend, 100 * high.unsqueeze(0), make_phase(0.3, 0.0)).norm() < 1e-3


def test_a_release_lies_in_the_subspace_with_the_whole_noise_inside(table_backend: Any) -> None:
    """Chi-square on all coordinates within the subspace over 300 releases, false alarms 1e-6."""
    phase, zero = make_phase(0.5), torch.zeros(2, sum(SLOTS))
    released = torch.stack([step(table_backend, zero, phase, stream) for stream in range(300)]).double()
    assert phase.projection is not None
    projection = torch.block_diag(*(matrix(phase.projection, size) for size in SLOTS))
    assert torch.allclose(released @ projection, released, atol=1e-5)
    values, vectors = torch.linalg.eigh(projection)
    inside = (released @ vectors[:, values > 0.5]).flatten()
    assert len(inside) < 0.6 * released.numel()
    for factor, fits in ((1.0, True), (0.9, False), (1.1, False)):
        statistic = float((factor * inside).square().sum()) / (SIGMA * CLIP) ** 2
        assert (chi2.ppf(5e-7, len(inside)) < statistic < chi2.isf(5e-7, len(inside))) == fits


def test_jobs_that_project_differently_are_refused(table_backend: Any) -> None:
    backend = table_backend(torch.zeros(2, sum(SLOTS)), SLOTS)
    secret = SecretRoot.seeded(0)
    jobs = [
        TrainingJob(
            records=np.array([index]),
            phase=make_phase(share),
            sampling=secret.numpy("s", index),
            noise=HostNoise(secret.numpy("n", index)),
        )
        for index, share in enumerate((0.3, 0.5))
    ]
    with pytest.raises(PrivacyError, match="project or clip differently"):
        train(
            backend,
            backend.dataset,
            jobs,
            torch.zeros(sum(SLOTS)),
            num_steps=1,
            learning_rate=1.0,
            training=TrainingConfig(),
            shapes=Shapes(100),
        )
