"""What every mechanism must do: release the sum plus the noise it declares. A new mechanism joins MECHANISMS."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.noise import HostNoise
from fedlora.randomness import SecretRoot

FALSE_ALARM = 1e-6
MECHANISMS = [GaussianMechanism(0.8), GaussianMechanism(20.0)]
P, RELEASES = 12, 20_000


def release(
    mechanism: GaussianMechanism, total: torch.Tensor, *, sensitivity: float = 1.5, stream: int = 0
) -> torch.Tensor:
    noise = HostNoise(SecretRoot.seeded(0).numpy("noise", stream))
    return mechanism.privatize(total.double(), sensitivity=sensitivity, noise=noise, slot_sizes=(P,))


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_no_direction_gets_less_noise_than_the_effective_multiplier_says(mechanism: GaussianMechanism) -> None:
    """Along each eigenvector of the released noise: its variance over (σ C)² is chi-square, false alarms 1e-6."""
    noise, zero = HostNoise(SecretRoot.seeded(1).numpy("noise")), torch.zeros(P, dtype=torch.float64)
    draws = torch.stack(
        [mechanism.privatize(zero, sensitivity=1.5, noise=noise, slot_sizes=(P,)) for _ in range(RELEASES)]
    ).double()
    std = mechanism.effective_noise_multiplier * 1.5
    halves = draws[: RELEASES // 2], draws[RELEASES // 2 :]
    directions = torch.linalg.eigh(halves[0].T @ halves[0])[1]  # chosen on one half, tested on the other
    for scale, fits in ((1.0, True), (0.9, False), (1.1, False)):
        statistic = (scale * halves[1] @ directions).square().sum(dim=0) / std**2
        limits = [chi2.ppf(FALSE_ALARM / P / 2, RELEASES // 2), chi2.isf(FALSE_ALARM / P / 2, RELEASES // 2)]
        inside = (statistic > limits[0]) & (statistic < limits[1])
        assert inside.all() if fits else not inside.any()


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_noise_does_not_depend_on_what_it_hides(mechanism: GaussianMechanism) -> None:
    total = torch.linspace(-5, 5, P)
    assert torch.allclose(release(mechanism, total) - total, release(mechanism, torch.zeros(P)), atol=1e-5)
    assert not torch.equal(release(mechanism, total), release(mechanism, total, stream=1))


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_noise_is_proportional_to_the_sensitivity(mechanism: GaussianMechanism) -> None:
    zero = torch.zeros(P)
    assert torch.allclose(release(mechanism, zero, sensitivity=3.0), 2 * release(mechanism, zero), rtol=1e-5)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_input_and_global_generators_are_untouched(
    mechanism: GaussianMechanism, untouched_global_generator: None
) -> None:
    total = torch.ones(P)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    released = release(mechanism, total)
    assert torch.equal(total, torch.ones(P))
    assert (released.dtype, released.shape) == (torch.float32, (P,))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_without_noise_the_sum_is_released_as_it_is() -> None:
    total = torch.ones(P)
    assert torch.equal(release(GaussianMechanism(0.0), total), total)
    assert GaussianMechanism(0.0).effective_noise_multiplier == 0.0


class _FarOut:
    """Draws what float32 normals of torch never reach."""

    def standard_normal(self, count: int, device: torch.device) -> torch.Tensor:
        return torch.full((count,), 9.0, dtype=torch.float64)


def test_noise_is_not_cut_off() -> None:
    """torch's float32 normals end at 5.77 standard deviations: outcomes that only one neighbour can produce cost δ."""
    one = torch.ones(3, dtype=torch.float64)
    released = GaussianMechanism(2.0).privatize(one, sensitivity=0.5, noise=_FarOut(), slot_sizes=(3,))
    assert released.tolist() == pytest.approx([10.0, 10.0, 10.0], rel=1e-6)
