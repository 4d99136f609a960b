"""The Gaussian mechanism: isotropic noise, once per released sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
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

    def privatize(self, total: Tensor, *, sensitivity: float, generator: np.random.Generator) -> Tensor:
        """`total` [P] float32 plus fresh noise of the same shape; with noise_multiplier 0 `total` unchanged.

        Drawn and added in float64 from a generator with a key of 128 bits. torch's own would not do: on the CPU its key
        has 32 bits and its normals end at 5.77 standard deviations, which alone is more than a small δ allows.
        """
        if self.noise_multiplier == 0:
            return total
        noise = torch.from_numpy(generator.standard_normal(total.numel())).view_as(total)
        noised = total.to("cpu", torch.float64) + self.noise_multiplier * sensitivity * noise
        return noised.to(total.device, torch.float32)
