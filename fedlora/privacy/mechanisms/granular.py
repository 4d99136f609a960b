"""Addition of noise that leaves no trace of its operands in the low bits: everything happens on one grid.

In floating point, `total + noise` is not the noised sum of the textbook. Which numbers can come out at all depends on
`total`, so that a few low bits of the release tell neighbours apart (Mironov 2012, "On Significance of the Least
Significant Bits for Differential Privacy"; against Gaussian noise and DP-SGD: Jin et al. 2022, "Are We There Yet?").
The way out taken here is that of Google's "Secure Noise Generation" (2020) for its Laplace and Gaussian noise: let
sum and noise be whole multiples of one power of two that no data decides, and add integers.

Exactly sampled discrete Gaussians (Canonne, Kamath, Steinke 2020) would leave nothing approximate, but take a rejection
sampler per number, whose running time can tell of the noise (Jin et al. 2022). Holohan and Braghin 2021, "Secure Random
Sampling in Differential Privacy", add up several draws so that the sampler cannot be inverted; with the low bits cut
off by the grid, it cannot be either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedlora.errors import PrivacyError

GRID_BITS = 24


def grid_of(std: float) -> float:
    """The power of two in (std / 2^25, std / 2^24] that a release with noise of `std` is a multiple of."""
    return 2.0 ** (math.frexp(std)[1] - 1 - GRID_BITS)


def released_std(*, noise_multiplier: float, sensitivity: float, size: int) -> float:
    """Standard deviation of the noise that `release_on_grid` adds to each of `size` numbers; 0 without noise.

    It is above noise_multiplier · sensitivity, as the grid widens the sensitivity: by a share of at most
    noise_multiplier · √size / 2^24, which is nothing for common multipliers and a multiple of it for huge ones.
    """
    if noise_multiplier == 0:
        return 0.0
    grid = grid_of(noise_multiplier * sensitivity)
    return noise_multiplier * (sensitivity + grid * math.sqrt(size))


def release_on_grid(total: Tensor, unit_noise: Tensor, *, noise_multiplier: float, sensitivity: float) -> Tensor:
    """`total` + noise_multiplier · sensitivity · `unit_noise` on the grid, [P] float32.

    With g the grid, Snap(x) the nearest multiple of g and s the standard deviation, what is released is
    Snap(total) + Snap(s · unit_noise). It equals Snap(Snap(total) + s · unit_noise), as a shift by whole steps commutes
    with rounding: post-processing of the Gaussian mechanism on Snap(total). Two neighbours that are C apart are at most
    C + g √P apart once snapped (g/2 for each coordinate of each), so s = noise_multiplier · (C + g √P) is what
    the multiplier promises; the addition is some 10⁻⁵ for P of ten thousands.

    Exact here: division by g, both roundings to integers, and, below 2^53, their sum. A larger sum is rounded, as the
    cast to float32 rounds: a function of the exact sum, so post-processing again.

    Not exact: `unit_noise` is a float64 number, so a cell of the grid has the chance of a rounded normal number only up
    to the sampler's resolution. NumPy's ziggurat has layers with steps of at most 3.7 / 2^52 and a cell is at least
    1 / 2^25 wide, both in standard deviations: some 2^25 numbers on every cell, an error of about 2^-24 of its chance.
    A finer grid would make that worse, and g √P is small already.

    Raises:
        PrivacyError: the noise does not fit the sum.
    """
    if unit_noise.shape != total.shape or unit_noise.dtype != torch.float64:
        raise PrivacyError(
            f"noise of shape {tuple(unit_noise.shape)} and {unit_noise.dtype} for a sum of shape {tuple(total.shape)}; "
            "wanted one float64 number for each, check that slot_sizes add up"
        )
    grid = grid_of(noise_multiplier * sensitivity)
    std = released_std(noise_multiplier=noise_multiplier, sensitivity=sensitivity, size=total.numel())
    steps = (total.double() / grid).round_() + (unit_noise * std / grid).round_()
    return (steps * grid).float()
