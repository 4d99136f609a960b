"""GReDP: noise on the Fourier coefficients of the gradient, of which the real part is kept.

Source: Wang, Jiang, Guo, Cai, Wang, Jia 2024, arXiv 2409.11663, which claims half of DP-SGD's noise. Only its abstract
could be read here, so the readings that the text allows are all here, each with the noise that it really releases.

With the orthonormal transform F, sum g and noise ν on its coefficients, Re F⁻¹(F g + ν) = g + Re F⁻¹ν: the sum plus
noise whose covariance decides the guarantee like any other's (`Mechanism`). With s = noise_multiplier · C and J the
reversal j -> n - j (mod n):

    noise         on a coefficient           covariance     effective σ   guarantee
    complex       both parts N(0, s²)        s² I           σ             that of plain Gaussian noise
    complex_half  both parts N(0, s²/2)      (s²/2) I       σ / √2        that of 1/√2 of the noise
    real          real part N(0, s²) only    (s²/2)(I + J)  0             none: g_j - g_{n-j} is in clear

No reading has less noise at the same ε. Derivation: F is symmetric and unitary, so its parts A = Re F and B = Im F
satisfy A Aᵀ = (I + J)/2 and B Bᵀ = (I - J)/2; the real part of ν reaches the release through A, the imaginary one
through B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from fedlora.privacy.mechanisms.granular import release_on_grid
from fedlora.privacy.noise import NoiseSource

CoefficientNoise = Literal["complex", "complex_half", "real"]

_EFFECTIVE: dict[CoefficientNoise, float] = {"complex": 1.0, "complex_half": math.sqrt(0.5), "real": 0.0}


@dataclass(frozen=True)
class GReDPMechanism:
    """Releases Re F⁻¹(F total + ν), F taken of each slot or of the whole vector. See the module for ν."""

    noise_multiplier: float
    noise: CoefficientNoise = "complex"
    over: Literal["slot", "flat"] = "slot"
    name: ClassVar[str] = "gredp"

    @classmethod
    def calibrated(
        cls, effective_noise_multiplier: float, *, noise: CoefficientNoise, over: Literal["slot", "flat"]
    ) -> Self:
        """As much nominal noise as makes `effective_noise_multiplier`; for real, what other noise would need."""
        share = _EFFECTIVE[noise] or 1.0
        nominal = effective_noise_multiplier / share
        if nominal * share < effective_noise_multiplier:  # rounding must not fall below what was asked
            nominal = math.nextafter(nominal, math.inf)
        return cls(nominal, noise, over)

    @property
    def effective_noise_multiplier(self) -> float:
        """As in the module's table. Blocks of one or two numbers have no odd part, but real noise is 0 for them too."""
        return _EFFECTIVE[self.noise] * self.noise_multiplier

    def covariance(self, size: int) -> np.ndarray:
        identity = np.eye(size)
        match self.noise:
            case "complex":
                shape = identity
            case "complex_half":
                shape = identity / 2
            case "real":
                shape = (identity + identity[-np.arange(size) % size]) / 2
        return self.noise_multiplier**2 * shape

    def privatize(self, total: Tensor, *, sensitivity: float, noise: NoiseSource, slot_sizes: Sequence[int]) -> Tensor:
        if self.noise_multiplier == 0:
            return total.float()
        blocks = [len(total)] if self.over == "flat" else slot_sizes
        unit_noise = torch.cat([self.unit_noise(size, noise, total.device) for size in blocks])
        return release_on_grid(total, unit_noise, noise_multiplier=self.noise_multiplier, sensitivity=sensitivity)

    def unit_noise(self, size: int, noise: NoiseSource, device: torch.device) -> Tensor:
        """Re F⁻¹ν of one block at noise_multiplier · C = 1, [size] float64.

        Only noise is ever transformed: the transform of a private sum would round in a way that depends on it.
        """
        real = noise.standard_normal(size, device)
        imaginary = torch.zeros_like(real) if self.noise == "real" else noise.standard_normal(size, device)
        spectrum = torch.complex(real, imaginary)
        if self.noise == "complex_half":
            spectrum *= math.sqrt(0.5)
        back: Tensor = torch.fft.ifft(spectrum, norm="ortho").real
        return back
