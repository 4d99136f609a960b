"""Post-processing of noised gradients: what a private step does with them before the optimiser sees them.

A filter receives values that the mechanism has already noised, the public weights, and public constants (gain, slot
sizes, noise scale); it never receives a record, a batch or an un-noised sum. By the post-processing theorem (Dwork and
Roth 2014, proposition 2.1), applied to the adaptive sequence of steps, it costs no privacy. DiSK chooses *where* the
next gradient is taken, as every optimiser does: that point is a function of earlier noised values only, and the
gradient taken there is clipped to C and gets the full noise of the accountant's multiplier.

A filter lives for one call of `train`, so for one round: the next round starts at the server's mean, of which a
client's own estimate and last move say little. Nothing is kept, with `training.keep_state` neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlora.config import TrainingConfig


class NoiseFilter(Protocol):
    """Filters the gradients of K clients over the steps of one call; rows never mix."""

    def point(self, theta: Tensor) -> Tensor:
        """Where this step's gradients are taken, [K, P], given the current `theta` [K, P]. Called once per step."""
        ...

    def refine(self, gradient: Tensor) -> Tensor:
        """What the optimiser gets, [K, P], for this step's noised mean gradients [K, P]. Called once per step."""
        ...


class NoFilter:
    """Gradients as they were released."""

    def point(self, theta: Tensor) -> Tensor:
        return theta

    def refine(self, gradient: Tensor) -> Tensor:
        return gradient


class DopplerFilter(NoFilter):
    """First-order low-pass over steps: m_t = (1 - gain) m_{t-1} + gain y_t, divided by the weight given so far.

    Noise variance of a step falls towards gain / (2 - gain) of what the mechanism added. The noise *summed* over many
    steps stays: the filter calms steps, it does not remove the random walk.

    Source: Zhang, Bu, Hong and Razaviyayn 2024 (arXiv 2408.13460), algorithm 1 with one pole and no zero; c_t there is
    `weight` here.
    """

    def __init__(self, gain: float) -> None:
        self.gain = gain
        self.mean: Tensor | None = None
        self.weight = 0.0

    def refine(self, gradient: Tensor) -> Tensor:
        before = torch.zeros_like(gradient) if self.mean is None else self.mean
        self.mean = before.mul(1 - self.gain).add_(gradient, alpha=self.gain)
        self.weight = (1 - self.gain) * self.weight + self.gain
        return self.mean / self.weight


class DiskFilter:
    """Simplified Kalman filter: the low-pass g_t = (1 - κ) g_{t-1} + κ y_t, with y_t taken ahead of x_t.

    With γ = (1 - κ) / κ the paper's combination of two gradients, at x_t and at x_t + γ (x_t - x_{t-1}), has weight 0
    on the first, so that one clipped and noised gradient is enough. Looking ahead makes up for the lag of the low-pass:
    without noise and with a gradient linear along the path, g_t is the gradient at x_t.

    Source: Zhang, Bu, Balle, Hong, Razaviyayn and Mirrokni, ICLR 2025 (arXiv 2410.03883), algorithm 1; g_0 is the
    first noised gradient, as in the authors' code. For any other γ that code divides σ by √(c² + (1 - c)²) with
    c = (1 - κ) / (κ γ), and so may add less noise than was accounted for: here γ is fixed and σ is never touched.
    """

    def __init__(self, gain: float) -> None:
        self.gain = gain
        self.ahead = (1 - gain) / gain
        self.previous: Tensor | None = None
        self.estimate: Tensor | None = None

    def point(self, theta: Tensor) -> Tensor:
        before = theta if self.previous is None else self.previous
        self.previous = theta.clone()
        return theta + self.ahead * (theta - before)

    def refine(self, gradient: Tensor) -> Tensor:
        before = gradient if self.estimate is None else self.estimate
        self.estimate = before.mul(1 - self.gain).add_(gradient, alpha=self.gain)
        return self.estimate


class JamesSteinFilter(NoFilter):
    """Shrinks each slot towards zero by the share of its energy that noise explains: the positive-part estimator.

    y * max(0, 1 - (n - 2) s² / |y|²) per slot of n > 2 numbers, whose mean squared error is below y's own whatever the
    true gradient; smaller slots stay. A slot in which noise outweighs signal by far is all but silenced, and one factor
    for a whole slot is no more than a learning rate of its own for each slot and step.

    Source: Stein 1956, James and Stein 1961; positive part: Baranchik 1964.
    """

    def __init__(self, slot_sizes: Sequence[int], noise_std: Sequence[float]) -> None:
        self.slot_sizes = tuple(slot_sizes)
        self.noise_variance = [std**2 for std in noise_std]

    def refine(self, gradient: Tensor) -> Tensor:
        variance = gradient.new_tensor(self.noise_variance, dtype=torch.float64).unsqueeze(1)
        shrunk = []
        for part in gradient.split(self.slot_sizes, dim=1):
            energy = part.double().square().sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            factor = (1 - max(part.shape[1] - 2, 0) * variance / energy).clamp_min(0)
            shrunk.append(part * factor.to(part.dtype))
        return torch.cat(shrunk, dim=1)


class BinomialFilter(NoFilter):
    """Smooths each slot's numbers, in their row-major order, with weights 1, 4, 6, 4, 1 over 16.

    Noise variance falls to 70/256 of what the mechanism added. So does that of a signal whose neighbouring numbers
    have nothing to do with one another, as those of an adapter's rows: what is left is a smooth part, if there is one.
    At a slot's ends its numbers are mirrored, so that nothing comes from another slot.

    Source: LA-LoRA, arXiv 2602.19926, whose text was not at hand: after notes on its public code, the order in which it
    smooths is our reading.
    """

    _WEIGHTS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)

    def __init__(self, slot_sizes: Sequence[int]) -> None:
        self.slot_sizes = tuple(slot_sizes)

    def refine(self, gradient: Tensor) -> Tensor:
        weights = gradient.new_tensor(self._WEIGHTS).view(1, 1, -1)
        return torch.cat([self._smooth(part, weights) for part in gradient.split(self.slot_sizes, dim=1)], dim=1)

    @staticmethod
    def _smooth(part: Tensor, weights: Tensor) -> Tensor:
        if part.shape[1] < weights.shape[2]:
            return part  # too short to be mirrored
        padded = F.pad(part.unsqueeze(1), (2, 2), mode="reflect")
        return F.conv1d(padded, weights).squeeze(1)


def make_filter(training: TrainingConfig, *, slot_sizes: Sequence[int], noise_std: Sequence[float]) -> NoiseFilter:
    """The filter that `training` names, with fresh state.

    Args:
        training: its `noise_filter` and `filter_gain`.
        slot_sizes: numbers in each slot of the flat vector, in layout order; their sum is P.
        noise_std: of a coordinate of each client's noised mean gradient, root mean square, [K]: σ C / expected batch
            size, with σ the *effective* multiplier (for noise that is not isotropic no more than it has).
    """
    match training.noise_filter:
        case "none":
            return NoFilter()
        case "doppler":
            return DopplerFilter(training.filter_gain)
        case "disk":
            return DiskFilter(training.filter_gain)
        case "james_stein":
            return JamesSteinFilter(slot_sizes, noise_std)
        case "binomial":
            return BinomialFilter(slot_sizes)
