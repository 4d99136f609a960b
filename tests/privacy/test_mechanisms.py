"""What every mechanism must do: release the sum plus the noise it declares. A new mechanism joins MECHANISMS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import block_diag
from scipy.stats import chi2
from torch import Tensor

from fedlora.config import RunConfig
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.mechanisms.gredp import GReDPMechanism
from fedlora.privacy.mechanisms.mechanism import Mechanism, make_mechanism
from fedlora.privacy.noise import HostNoise, NoiseSource
from fedlora.randomness import SecretRoot

FALSE_ALARM = 1e-6
NOISES, OVERS = ("complex", "complex_half", "real"), ("slot", "flat")
GREDP = [GReDPMechanism(1.3, noise, over) for noise in NOISES for over in OVERS]  # type: ignore[arg-type]
MECHANISMS: list[Mechanism] = [GaussianMechanism(0.8), GaussianMechanism(20.0), *GREDP]
SLOTS, P, RELEASES = (1, 2, 3, 8), 14, 6000
SENSITIVITY = 1.5

every_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)


def secret(*path: str | int) -> HostNoise:
    return HostNoise(SecretRoot.seeded(0).numpy("noise", *path))


def release(mechanism: Mechanism, total: Tensor, *, sensitivity: float = SENSITIVITY, stream: int = 0) -> Tensor:
    """[P] of a sum in float64, or of any length as one slot."""
    slots = SLOTS if len(total) == P else (len(total),)
    return mechanism.privatize(total.double(), sensitivity=sensitivity, noise=secret(stream), slot_sizes=slots)


def releases(mechanism: Mechanism, count: int = RELEASES) -> Tensor:
    """[count, P] float64: noise alone, from one stream that goes on."""
    zero, noise = torch.zeros(P, dtype=torch.float64), secret("many")
    one = [mechanism.privatize(zero, sensitivity=SENSITIVITY, noise=noise, slot_sizes=SLOTS) for _ in range(count)]
    return torch.stack(one).double()


def declared(mechanism: Mechanism) -> np.ndarray:
    """Σ of the whole released vector over C²: block by block, or of the whole where that is what is transformed."""
    blocks = (P,) if isinstance(mechanism, GReDPMechanism) and mechanism.over == "flat" else SLOTS
    return block_diag(*(mechanism.covariance(size) for size in blocks))


def has_covariance(draws: Tensor, covariance: np.ndarray) -> bool:
    """Test that rows [R, P] are independent N(0, covariance), false alarms 1e-6.

    In the eigenbasis, null directions must be silent up to the grid, and the others, divided by their standard
    deviation, have R mean squares that are chi-square and pairwise correlations whose square times R is chi-square(1)
    for large R (conservative in the far tail); half of the false alarms each, Bonferroni within.
    """
    values, vectors = np.linalg.eigh(covariance)
    along = draws.numpy() @ vectors
    null = values < 1e-9 * values.max()
    if (np.abs(along[:, null]) > 1e-5 * np.sqrt(values.max())).any():
        return False
    white = along[:, ~null] / np.sqrt(values[~null])
    count, directions = white.shape
    share = FALSE_ALARM / 2 / directions
    squares = (white**2).sum(axis=0)
    right_size = (squares > chi2.ppf(share / 2, count)) & (squares < chi2.isf(share / 2, count))
    correlations = np.corrcoef(white.T)[np.triu_indices(directions, 1)]
    unrelated = correlations**2 * count < chi2.isf(FALSE_ALARM / 2 / len(correlations), 1)
    return bool(right_size.all() and unrelated.all())


# ------------------------------------------------------------------------------------------------------ the contract


@every_mechanism
def test_the_released_noise_has_the_declared_covariance(mechanism: Mechanism) -> None:
    draws, covariance = releases(mechanism), SENSITIVITY**2 * declared(mechanism)
    assert has_covariance(draws, covariance)
    for factor in (0.9, 1.1):
        assert not has_covariance(factor * draws, covariance)
    others = [other for other in MECHANISMS if not np.allclose(declared(other), declared(mechanism), rtol=0.1)]
    assert len(others) >= 4
    for other in others:
        assert not has_covariance(draws, SENSITIVITY**2 * declared(other))


@every_mechanism
@pytest.mark.parametrize("size", [1, 2, 3, 8, 9, 64])
def test_the_effective_multiplier_is_that_of_the_least_noisy_direction(mechanism: Mechanism, size: int) -> None:
    smallest = np.linalg.eigvalsh(mechanism.covariance(size)).min()
    if isinstance(mechanism, GReDPMechanism) and mechanism.noise == "real" and size <= 2:
        assert smallest == pytest.approx(1.3**2), "one or two numbers have no odd part; effective stays 0 all the same"
        assert mechanism.effective_noise_multiplier == 0
    else:
        assert mechanism.effective_noise_multiplier**2 == pytest.approx(smallest, abs=1e-12)


@every_mechanism
def test_noise_does_not_depend_on_what_it_hides(mechanism: Mechanism) -> None:
    total = torch.linspace(-5, 5, P)
    assert torch.allclose(release(mechanism, total) - total, release(mechanism, torch.zeros(P)), atol=1e-5)
    assert not torch.equal(release(mechanism, total), release(mechanism, total, stream=1))


@every_mechanism
def test_noise_is_proportional_to_the_sensitivity(mechanism: Mechanism) -> None:
    zero = torch.zeros(P)
    doubled, once = release(mechanism, zero, sensitivity=3.0), release(mechanism, zero)
    assert torch.allclose(doubled, 2 * once, rtol=1e-5, atol=1e-5)


@every_mechanism
def test_noise_is_drawn_afresh_for_every_sum_and_slot(mechanism: Mechanism) -> None:
    noise, zero = secret(5), torch.zeros(P, dtype=torch.float64)
    first, second = (
        mechanism.privatize(zero, sensitivity=1.0, noise=noise, slot_sizes=(7, 7)).double() for _ in range(2)
    )
    pieces = torch.stack([*first.split(7), *second.split(7)])
    assert len({tuple(piece.tolist()) for piece in pieces}) == 4


@every_mechanism
def test_input_and_global_generators_are_untouched(mechanism: Mechanism, untouched_global_generator: None) -> None:
    total = torch.ones(P, dtype=torch.float64)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    released = mechanism.privatize(total, sensitivity=1.0, noise=secret(0), slot_sizes=SLOTS)
    assert torch.equal(total, torch.ones(P, dtype=torch.float64))
    assert (released.dtype, released.shape) == (torch.float32, (P,))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


@pytest.mark.parametrize("silent", [GaussianMechanism(0.0), GReDPMechanism(0.0)], ids=repr)
def test_without_noise_the_sum_is_released_as_it_is(silent: Mechanism) -> None:
    total = torch.linspace(-1, 1, P)
    assert torch.equal(release(silent, total), total)
    assert silent.effective_noise_multiplier == 0.0


class _FarOut:
    """Draws what float32 normals of torch never reach."""

    def standard_normal(self, count: int, device: torch.device) -> Tensor:
        return torch.full((count,), 9.0, dtype=torch.float64)


def test_noise_is_not_cut_off() -> None:
    """torch's float32 normals end at 5.77 standard deviations: outcomes that only one neighbour can produce cost δ."""
    one = torch.ones(3, dtype=torch.float64)
    released = GaussianMechanism(2.0).privatize(one, sensitivity=0.5, noise=_FarOut(), slot_sizes=(3,))
    assert released.tolist() == pytest.approx([10.0, 10.0, 10.0], rel=1e-6)


# ----------------------------------------------------------------------------------------------------- calibration


@given(st.floats(1e-3, 1e6))
def test_a_made_mechanism_has_the_effective_noise_that_was_asked_for(target: float) -> None:
    for overrides, nominal in (
        (["privacy.mechanism=gaussian"], target),
        (["privacy.mechanism=gredp"], target),
        (["privacy.mechanism=gredp", "privacy.gredp_noise=complex_half"], 2**0.5 * target),
    ):
        made = make_mechanism(RunConfig().with_overrides(*overrides).privacy, target)
        assert target <= made.effective_noise_multiplier <= target * (1 + 1e-12)
        assert made.noise_multiplier == pytest.approx(nominal, rel=1e-12)


def test_real_noise_gets_the_nominal_multiplier_and_no_effective_one() -> None:
    config = RunConfig().with_overrides(
        "privacy.mechanism=gredp", "privacy.gredp_noise=real", "privacy.gredp_over=flat"
    )
    made = make_mechanism(config.privacy, 1.7)
    assert made == GReDPMechanism(1.7, "real", "flat")
    assert (made.noise_multiplier, made.effective_noise_multiplier) == (1.7, 0.0)


# ------------------------------------------------------------------------------------------------- GReDP as it is told


@dataclass
class _Replayed:
    """A noise source that writes down what it drew."""

    source: NoiseSource
    drawn: list[np.ndarray]

    def standard_normal(self, count: int, device: torch.device) -> Tensor:
        self.drawn.append(self.source.standard_normal(count, device).numpy())
        return torch.from_numpy(self.drawn[-1])


def told(total: np.ndarray, drawn: list[np.ndarray], noise: str, std: float) -> np.ndarray:
    """The paper's steps on one block: transform, noise on the coefficients, back, real part."""
    parts = {"complex": (1, 1), "complex_half": (0.5**0.5, 0.5**0.5), "real": (1, 0)}[noise]
    coefficients = np.fft.fft(total, norm="ortho") + std * parts[0] * drawn[0]
    if parts[1]:
        coefficients = coefficients + 1j * std * parts[1] * drawn[1]
    return np.fft.ifft(coefficients, norm="ortho").real


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 9, 64, 1000])
def test_noise_is_that_of_the_literal_path(noise: Any, size: int) -> None:
    """Linearity: noise on the coefficients of the sum is noise on the sum."""
    mechanism, source = GReDPMechanism(2.0, noise), _Replayed(secret(size), [])
    total = np.random.default_rng(size).normal(size=size)
    unit = mechanism.unit_noise(size, source, torch.device("cpu")).numpy()
    assert np.abs(total + 0.7 * unit - told(total, source.drawn, noise, 0.7)).max() < 1e-12


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("over", OVERS)
def test_a_release_is_that_of_the_literal_path_up_to_its_grid(noise: Any, over: Any) -> None:
    total, source = torch.linspace(-2, 3, P, dtype=torch.float64), _Replayed(secret(0), [])
    got = GReDPMechanism(2.0, noise, over).privatize(total, sensitivity=0.5, noise=source, slot_sizes=SLOTS)
    blocks = (P,) if over == "flat" else SLOTS
    draws = 1 if noise == "real" else 2
    assert [len(drawn) for drawn in source.drawn] == [size for size in blocks for _ in range(draws)]
    wanted = [
        told(part.numpy(), source.drawn[draws * index :], noise, 1.0)
        for index, part in enumerate(total.split(list(blocks)))
    ]
    assert np.allclose(got.numpy(), np.concatenate(wanted), atol=2e-6)


def separation(noise: Any, *, sigma: float, trials: int) -> tuple[float, float]:
    """(TPR, FPR) of the test <y, odd> > 1/2 for a record that is the unit vector `odd`, with odd_j = -odd_{n-j}."""
    size = 32
    odd = torch.sin(2 * torch.pi * torch.arange(size, dtype=torch.float64) / size)
    odd /= odd.norm()
    mechanism, source = GReDPMechanism(sigma, noise), secret("attack")
    rates = []
    for total in (odd, torch.zeros(size, dtype=torch.float64)):
        draws = [
            mechanism.privatize(total, sensitivity=1.0, noise=source, slot_sizes=(size,)).double()
            for _ in range(trials)
        ]
        rates.append(float((torch.stack(draws) @ odd > 0.5).double().mean()))
    return rates[0], rates[1]


def test_real_noise_releases_the_odd_part_in_clear() -> None:
    assert separation("real", sigma=4.0, trials=500) == (1.0, 0.0)


@pytest.mark.parametrize(("noise", "largest"), [("complex", 0.0995), ("complex_half", 0.1403)])
def test_complex_noise_hides_the_odd_part_as_well_as_it_says(noise: str, largest: float) -> None:
    """TPR - FPR is at most 2 Φ(1 / 2 σ_eff) - 1, reached here; Hoeffding's bound on both rates, false alarms 1e-6."""
    trials = 4000
    tpr, fpr = separation(noise, sigma=4.0, trials=trials)
    slack = 2 * np.sqrt(np.log(4 / FALSE_ALARM) / 2 / trials)
    assert abs(tpr - fpr - largest) < slack < 0.1


# ---------------------------------------------------------------------------------------- the trap of the normalisation


class _Unnormalised(GReDPMechanism):
    """Noise of std σ C on the coefficients of an FFT without normalisation, for a sum that was clipped before it."""

    def unit_noise(self, size: int, noise: NoiseSource, device: torch.device) -> Tensor:
        spectrum = torch.complex(noise.standard_normal(size, device), noise.standard_normal(size, device))
        return torch.fft.ifft(spectrum).real


def test_noise_on_an_unnormalised_spectrum_is_caught() -> None:
    """There |F g| = √n |g|, so the noise that comes back is σ C / √n."""
    assert not has_covariance(releases(_Unnormalised(1.3)), SENSITIVITY**2 * declared(GReDPMechanism(1.3)))


@pytest.mark.parametrize("over", OVERS)
@pytest.mark.parametrize("size", [4, 64, 1024])
def test_noise_does_not_fall_with_the_length_of_a_block(over: Any, size: int) -> None:
    def energy(mechanism: GReDPMechanism) -> float:
        zero, noise = torch.zeros(size, dtype=torch.float64), secret(size)
        slots: Sequence[int] = (size,)
        draws = [
            mechanism.privatize(zero, sensitivity=1.0, noise=noise, slot_sizes=slots) for _ in range(20_000 // size + 1)
        ]
        return float(torch.stack(draws).double().square().mean())

    assert energy(GReDPMechanism(3.0, "complex", over)) == pytest.approx(9.0, rel=0.06)
    assert energy(_Unnormalised(3.0, "complex", over)) == pytest.approx(9.0 / size, rel=0.06)
