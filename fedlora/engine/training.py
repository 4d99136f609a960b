"""Private local training of K clients at once: Poisson batch, clip, sum, noise, divide, step.

The caller hands over jobs and gets trained rows. It never sees a gradient, a batch or a loss, so an unclipped or
un-noised one cannot escape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.config import TrainingConfig
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import GradientBackend
from fedlora.engine.batching import Shapes
from fedlora.engine.filters import make_filter
from fedlora.engine.releases import privatize_all
from fedlora.engine.sums import clipped_sums
from fedlora.errors import PrivacyError
from fedlora.privacy.noise import NoiseSource
from fedlora.privacy.plan import PhasePlan

OptimizerState = dict[str, Any]


@dataclass(kw_only=True)
class TrainingJob:
    """One client's share of a call: its records, its plan and its two secret streams."""

    records: np.ndarray
    """Positions of the client's records in the data set given to `train`, int64 [n]."""
    phase: PhasePlan
    sampling: np.random.Generator = field(repr=False)
    noise: NoiseSource = field(repr=False)
    optimizer_state: OptimizerState | None = None
    """State of the local optimiser to start from; None starts afresh."""


@dataclass(frozen=True)
class TrainedRow:
    """What one job ends with: its flat vector [P] float32 and, to be kept at the site, its optimiser's state."""

    theta: Tensor
    optimizer_state: OptimizerState


def train(
    backend: GradientBackend,
    dataset: EncodedDataset,
    jobs: Sequence[TrainingJob],
    theta: Tensor,
    *,
    num_steps: int,
    learning_rate: float,
    training: TrainingConfig,
    shapes: Shapes,
    cohort: int | None = None,
) -> list[TrainedRow]:
    """Train every job for `num_steps` private steps from the common `theta` [P] float32.

    Each step draws one Poisson batch per job (possibly empty), sums the clipped per-record gradients, adds noise once
    per job, divides by the *expected* batch size and takes one optimiser step. Source: Abadi et al. 2016, Algorithm 1.

    Args:
        cohort: clients of the round, where these jobs are a wave of it; nobody's bits tell how it was divided.

    Raises:
        PrivacyError: the jobs project or clip differently. One call treats all records alike; each job's noise fits
            its own plan.
    """
    if len({(job.phase.clipping, job.phase.projection) for job in jobs}) > 1:
        raise PrivacyError("jobs of one call project or clip differently; train them in separate calls")
    rows = theta.repeat(len(jobs), 1)
    parameters = [nn.Parameter(row) for row in rows]  # views: a step moves `rows`
    optimizer = make_optimizer(training, learning_rate, parameters)
    for parameter, job in zip(parameters, jobs, strict=True):
        if job.optimizer_state is not None:
            optimizer.state[parameter] = _copied(job.optimizer_state, rows.device)
    noise_filter = make_filter(
        training, slot_sizes=backend.slot_sizes, noise_std=[_noise_std(job.phase, training) for job in jobs]
    )
    for _ in range(num_steps):
        point = noise_filter.point(rows)
        gradients = torch.stack(_private_mean_gradients(backend, dataset, jobs, point, training, shapes, cohort))
        for parameter, gradient in zip(parameters, noise_filter.refine(gradients), strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        del gradients, gradient  # or they would lie beside the next step's sums
    return [TrainedRow(parameter.detach().clone(), dict(optimizer.state[parameter])) for parameter in parameters]


def _noise_std(phase: PhasePlan, training: TrainingConfig) -> float:
    """Root mean square of the noise over the coordinates of a noised mean gradient: public. A projection drops some."""
    kept = 1.0 if phase.projection is None else phase.projection.share
    std = phase.mechanism.effective_noise_multiplier * phase.sensitivity / training.expected_batch_size
    return math.sqrt(kept) * std


def _private_mean_gradients(
    backend: GradientBackend,
    dataset: EncodedDataset,
    jobs: Sequence[TrainingJob],
    rows: Tensor,
    training: TrainingConfig,
    shapes: Shapes,
    cohort: int | None,
) -> list[Tensor]:
    """One logical step: for each job (clipped sum + noise) / expected batch size, [P]."""
    drawn = [job.records[job.phase.sampler.draw(len(job.records), job.sampling)] for job in jobs]
    phase, clients = jobs[0].phase, cohort or len(jobs)
    how: dict[str, Any] = {"shapes": shapes, "clients": clients, "expected": clients * training.expected_batch_size}
    totals = clipped_sums(backend, dataset, drawn, rows, phase, **how)
    released = privatize_all([job.phase for job in jobs], totals, [job.noise for job in jobs], backend.slot_sizes)
    return [gradient.div_(training.expected_batch_size) for gradient in released]


def _copied(state: OptimizerState, device: torch.device) -> OptimizerState:
    """Optimisers change their state in place, and one read from a checkpoint lies on the CPU, where `step` belongs."""
    return {
        key: value.to("cpu" if key == "step" else device, copy=True) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def make_optimizer(training: TrainingConfig, rate: float, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's own optimiser, one parameter per client: element-wise rules keep the clients apart."""
    decay = training.weight_decay
    match training.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, weight_decay=decay)
        case "momentum":
            return torch.optim.SGD(parameters, lr=rate, momentum=training.momentum, weight_decay=decay)
        case "adam":
            return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
