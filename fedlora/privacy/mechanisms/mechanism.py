"""The seam behind which a clipped sum becomes a release, and what every mechanism must declare about its noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from fedlora.config import PrivacyConfig
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.mechanisms.gredp import GReDPMechanism
from fedlora.privacy.noise import NoiseSource


class Mechanism(Protocol):
    """Releases a sum plus Gaussian noise whose covariance it declares.

    For noise of covariance Σ on a sum of L2 sensitivity C the guarantee is that of isotropic noise with standard
    deviation √λ_min(Σ), and this is tight: differences between neighbours fill the whole ball of radius C, so one lies
    along the eigenvector of the smallest eigenvalue. The accountant therefore sees `effective_noise_multiplier` only.
    """

    @property
    def name(self) -> str: ...

    @property
    def noise_multiplier(self) -> float:
        """Nominal: the σ that the mechanism's own description speaks of."""
        ...

    @property
    def effective_noise_multiplier(self) -> float:
        """√λ_min(Σ) / C, or less: what the guarantee follows from."""
        ...

    def covariance(self, size: int) -> np.ndarray:
        """Σ / C² of the noise on one block of `size` numbers that is noised together, float64 [size, size]."""
        ...

    def privatize(self, total: Tensor, *, sensitivity: float, noise: NoiseSource, slot_sizes: Sequence[int]) -> Tensor:
        """`total` plus fresh noise.

        Args:
            total: [P] float64, moved by at most `sensitivity` in L2 when one record comes or goes.
            sensitivity: C.
            noise: the site's secret source; goes on from call to call.
            slot_sizes: how `total` divides into slots, in order; they add up to P.

        Returns:
            [P] float32; with noise_multiplier 0 just `total`.
        """
        ...


def make_mechanism(privacy: PrivacyConfig, effective_noise_multiplier: float) -> Mechanism:
    """The configured mechanism with just enough noise that its *effective* multiplier is the one asked for.

    GReDP's real noise reaches none: it comes with the nominal multiplier that plain Gaussian noise would need.
    """
    if privacy.mechanism == "gredp":
        return GReDPMechanism.calibrated(effective_noise_multiplier, noise=privacy.gredp_noise, over=privacy.gredp_over)
    return GaussianMechanism(effective_noise_multiplier)
