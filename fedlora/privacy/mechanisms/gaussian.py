"""The Gaussian mechanism: isotropic noise, once per released sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianMechanism:
    """Releases `total + N(0, (noise_multiplier * sensitivity)^2 I)`.

    Source: Dwork and Roth 2014, appendix A; as a step of DP-SGD, Abadi et al. 2016, Algorithm 1.
    """

    noise_multiplier: float
    name: ClassVar[str] = "gaussian"

    @property
    def effective_noise_multiplier(self) -> float:
        """Square root of the smallest eigenvalue of the released noise's covariance, over the sensitivity."""
        return self.noise_multiplier

    def privatize(self, total: Tensor, *, sensitivity: float, generator: torch.Generator) -> Tensor:
        """`total` [P] float32 plus fresh noise of the same shape; with noise_multiplier 0 `total` unchanged."""
        if self.noise_multiplier == 0:
            return total
        noise = torch.empty_like(total).normal_(generator=generator)
        return total.add(noise, alpha=self.noise_multiplier * sensitivity)
