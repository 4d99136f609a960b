"""Noise sources, and the release on a grid: nothing of the sum is left in the low bits."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, chi2_contingency
from torch import Tensor

from fedlora.errors import ConfigError, PrivacyError
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.mechanisms.granular import grid_of, release_on_grid, released_std
from fedlora.privacy.noise import DeviceNoise, HostNoise, make_noise_source
from fedlora.randomness import SecretRoot

CPU = torch.device("cpu")
# sums whose own low bits are as different as can be
TOTALS = (0.0, 1.0, 1 / 3, 0.1, -math.pi, 2.0**-40, 1e-9, 1000.0)


def stream(*path: str | int) -> np.random.Generator:
    return SecretRoot.seeded(0).numpy(*path)


# -------------------------------------------------------------------------------------------------------------- sources


def test_host_noise_is_the_secret_stream_in_float64_and_goes_on() -> None:
    source, wanted = HostNoise(stream("noise")), stream("noise").standard_normal(30)
    got = torch.cat([source.standard_normal(10, CPU), source.standard_normal(20, CPU)])
    assert got.dtype == torch.float64
    assert np.array_equal(got.numpy(), wanted)


def test_a_source_does_not_show_its_stream() -> None:
    for source in (HostNoise(stream("noise")), DeviceNoise(stream("noise"))):
        assert "generator" not in repr(source)


def test_device_noise_on_the_cpu_is_refused() -> None:
    """torch's CPU generator looks at 32 bits of its seed, so this noise could be searched for."""
    with pytest.raises(ConfigError, match=r"engine.noise = device .* on cpu.*set engine.noise=host"):
        make_noise_source("device", stream("noise"), CPU)
    with pytest.raises(ConfigError, match=r"set engine\.noise=host"):
        DeviceNoise(stream("noise")).standard_normal(3, CPU)
    assert make_noise_source("host", (own := stream("noise")), CPU) == HostNoise(own)


@pytest.mark.gpu
def test_device_noise_is_normal_fresh_and_decided_by_the_secret_stream() -> None:
    """Chi-square on 10^6 draws, false alarms 1e-6: 0.9 and 1.1 times the noise are far outside."""
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    device, before = torch.device("cuda"), torch.cuda.get_rng_state()
    source = make_noise_source("device", stream("noise"), device)
    first, second = (source.standard_normal(10**6, device) for _ in range(2))
    assert (first.dtype, first.device.type) == (torch.float64, "cuda")
    assert abs(float(first.square().mean()) - 1) < 5 * math.sqrt(2 / 10**6)
    assert abs(float((first * second).mean())) < 5 / math.sqrt(10**6)
    assert torch.equal(DeviceNoise(stream("noise")).standard_normal(10**6, device), first)
    assert torch.equal(before, torch.cuda.get_rng_state())


# ----------------------------------------------------------------------------------------------------------- the grid


@given(st.floats(1e-30, 1e30))
def test_the_grid_is_a_power_of_two_far_below_the_noise(std: float) -> None:
    grid = grid_of(std)
    assert math.frexp(grid)[0] == 0.5
    assert 2.0**-25 < grid / std <= 2.0**-24


def released(total: float, count: int, *, sigma: float = 1.0) -> Tensor:
    """[count] float64 of a sum that is `total` everywhere."""
    sums = torch.full((count,), total, dtype=torch.float64)
    noise = HostNoise(stream("low bits", str(total)))
    return GaussianMechanism(sigma).privatize(sums, sensitivity=1.0, noise=noise, slot_sizes=(count,)).double()


@pytest.mark.parametrize("sigma", [1.0, 0.37, 20.0])
def test_every_release_is_a_multiple_of_the_grid(sigma: float) -> None:
    for total in TOTALS:
        steps = released(total, 10_000, sigma=sigma) / grid_of(sigma)
        assert torch.equal(steps, steps.round())


def small(values: Tensor) -> Tensor:
    return values[values.abs() < 0.25]


def betrays_one(values: Tensor) -> bool:
    """Attack on a release of many numbers: are all of the small ones multiples of 2^-53, as 1 + noise is near zero?"""
    steps = small(values) * 2.0**53
    return bool((steps == steps.round()).all())


def test_low_bits_tell_the_sum_of_a_naive_addition_and_nothing_of_ours() -> None:
    """Mironov 2012 for Gaussian noise: float64 addition leaves only some numbers reachable from each sum."""
    for trial in range(50):
        noise = torch.from_numpy(stream("naive", trial).standard_normal(200))
        assert betrays_one(1.0 + noise), "TPR 1"
        assert not betrays_one(0.0 + noise), "FPR 0"
    assert betrays_one(released(0.0, 200)) == betrays_one(released(1.0, 200))


def test_low_bits_have_one_distribution_whatever_the_sum() -> None:
    """Trailing zeros of what is released, in steps of the grid, within one window; chi-square, false alarms 1e-6."""

    def zeros(values: Tensor, step: float) -> np.ndarray:
        steps = np.rint(small(values).numpy() / step).astype(np.int64)
        found = np.log2(np.maximum(steps & -steps, 1))
        return np.bincount(np.minimum(found, 7).astype(int), minlength=8)

    tables = np.stack([zeros(released(total, 200_000), grid_of(1.0)) for total in TOTALS if abs(total) < 4])
    assert chi2_contingency(tables).pvalue > 1e-6
    naive = [torch.from_numpy(stream("zeros", str(t)).standard_normal(200_000)) + t for t in (0.0, 1.0)]
    assert chi2_contingency(np.stack([zeros(values, 2.0**-55) for values in naive])).pvalue < 1e-100


@given(
    st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=6),
    st.floats(0.01, 100),
    st.floats(0.01, 100),
    st.integers(0, 100),
)
def test_a_release_is_the_sum_of_two_whole_numbers_of_steps(
    values: list[float], sigma: float, sensitivity: float, seed: int
) -> None:
    """Against exact arithmetic: only the cast to float32 at the end rounds."""
    unit = np.random.default_rng(seed).normal(size=len(values))
    got = release_on_grid(
        torch.tensor(values, dtype=torch.float64),
        torch.from_numpy(unit),
        noise_multiplier=sigma,
        sensitivity=sensitivity,
    )
    grid = Fraction(grid_of(sigma * sensitivity))
    std = sigma * (sensitivity + float(grid) * math.sqrt(len(values)))
    for value, noise, out in zip(values, unit, got.tolist(), strict=True):
        steps = round(Fraction(value) / grid) + round(Fraction(noise * std) / grid)
        assert np.float32(float(steps * grid)) == out


@pytest.mark.parametrize("size", [100, 1000, 40_000])
def test_the_noise_covers_what_snapping_adds_to_the_sensitivity(size: int) -> None:
    """Neighbours C apart are up to C + g √P apart on the grid; the noise is measured against that."""
    grid = grid_of(1.0)
    ones = torch.ones(size, dtype=torch.float64)
    farthest = (ones * (0.5 + 2**-20) * grid, -ones * (0.5 + 2**-20) * grid)  # each snaps away from the other
    silent = torch.zeros_like(ones)
    snapped = [release_on_grid(x, silent, noise_multiplier=1.0, sensitivity=1.0).double() for x in farthest]
    apart, asked = (snapped[0] - snapped[1]).norm(), (farthest[0] - farthest[1]).norm()
    assert asked < 1.01 * grid * math.sqrt(size)
    assert apart == pytest.approx(2 * grid * math.sqrt(size))
    assert apart <= asked + grid * math.sqrt(size)
    std = release_on_grid(silent, ones * 2.0**20, noise_multiplier=1.0, sensitivity=1.0).double().max() / 2.0**20
    assert float(std) == pytest.approx(1 + grid * math.sqrt(size), abs=2 * grid)


def test_noise_that_does_not_fit_the_sum_is_refused() -> None:
    """One number of noise for all would be broadcast, and cancel in every difference."""
    total = torch.zeros(4, dtype=torch.float64)
    for noise in (torch.zeros(1, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), torch.zeros(4)):
        with pytest.raises(PrivacyError, match="wanted one float64 number for each"):
            release_on_grid(total, noise, noise_multiplier=1.0, sensitivity=1.0)


@pytest.mark.parametrize("noise_multiplier", [0.5, 1e6, 1e8])
def test_the_stated_deviation_is_that_of_what_is_released(noise_multiplier: float) -> None:
    """Chi-square, false alarms 1e-6 each; σ·C itself, 6 % below at 10⁶, is rejected where the grid is that coarse."""
    source = HostNoise(stream("noise"))
    settings = {"noise_multiplier": noise_multiplier, "sensitivity": 2.0}
    silent = torch.zeros(4, dtype=torch.float64)
    released = torch.cat(
        [release_on_grid(silent, source.standard_normal(4, CPU), **settings).double() for _ in range(10_000)]
    )
    low, high = chi2.ppf(5e-7, len(released)), chi2.isf(5e-7, len(released))
    std = released_std(size=4, **settings)
    for stated, fits in ((std, True), (0.95 * std, False), (2.0 * noise_multiplier, noise_multiplier < 1)):
        assert (low < float((released / stated).square().sum()) < high) == fits


def test_without_noise_the_stated_deviation_is_none() -> None:
    assert released_std(noise_multiplier=0.0, sensitivity=1.0, size=4) == 0.0
