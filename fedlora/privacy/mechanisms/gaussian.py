"""The Gaussian mechanism: isotropic noise, once per released sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fedlora.privacy.mechanisms.granular import release_on_grid
from fedlora.privacy.noise import NoiseSource


@dataclass(frozen=True)
class GaussianMechanism:
    """Releases `total + N(0, (noise_multiplier * sensitivity)^2 I)`.

    Source: Dwork and Roth 2014, appendix A; as a step of DP-SGD, Abadi et al. 2016, Algorithm 1.
    """

    noise_multiplier: float
    name: ClassVar[str] = "gaussian"

    @property
    def effective_noise_multiplier(self) -> float:
        return self.noise_multiplier

    def covariance(self, size: int) -> np.ndarray:
        return self.noise_multiplier**2 * np.eye(size)

    def privatize(self, total: Tensor, *, sensitivity: float, noise: NoiseSource, slot_sizes: Sequence[int]) -> Tensor:
        if self.noise_multiplier == 0:
            return total.float()
        unit_noise = noise.standard_normal(total.numel(), total.device)
        return release_on_grid(total, unit_noise, noise_multiplier=self.noise_multiplier, sensitivity=sensitivity)
