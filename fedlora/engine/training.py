"""Private local training of K clients at once: Poisson batch, clip, sum, noise, divide, step.

The caller hands over jobs and gets trained rows. It never sees a gradient, a batch or a loss, so an unclipped or
un-noised one cannot escape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.adapters.methods import Parts, Turn
from fedlora.adapters.slots import AdapterLayout
from fedlora.config import TrainingConfig
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import GradientBackend
from fedlora.engine.batching import Shapes
from fedlora.engine.filters import NoiseFilter, make_filter
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
    active: Tensor | None = None
    """[P] bool: coordinates that a client of a smaller rank has; the rest is zero and stays so. None: all of them."""


@dataclass(frozen=True)
class Division:
    """What the steps of a round train of a layout's flat vector, in turn."""

    layout: AdapterLayout
    turns: tuple[Turn, ...]
    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rates of parts over that of the call; 1 where nothing is said."""

    @property
    def trained(self) -> Parts:
        """What some turn trains, in the order of the layout."""
        return tuple(part for part in self.layout.parts if any(part in turn.parts for turn in self.turns))


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
    division: Division | None = None,
) -> list[TrainedRow]:
    """Train every job for `num_steps` private steps from `theta`, [P] common to all or [K, P], float32.

    Each step draws one Poisson batch per job (possibly empty), sums the clipped per-record gradients of what it trains,
    adds noise once per job, divides by the *expected* batch size and takes one optimiser step. Source: Abadi et al.
    2016, Algorithm 1.

    Args:
        cohort: clients of the round, where these jobs are a wave of it; nobody's bits tell how it was divided.
        division: what is trained in which step; everything in every step by default.

    Raises:
        PrivacyError: the jobs project or clip differently. One call treats all records alike; each job's noise fits
            its own plan. Or the division is another back end's.
    """
    if len({(job.phase.clipping, job.phase.projection) for job in jobs}) > 1:
        raise PrivacyError("jobs of one call project or clip differently; train them in separate calls")
    division = division or _undivided(backend)
    if [slot.size for slot in division.layout.slots] != [*backend.slot_sizes]:
        raise PrivacyError("the division has other slots than the back end's gradients. This is a fault of fedlora")
    rows = theta.repeat(len(jobs), 1) if theta.dim() == 1 else theta.clone()
    # A parameter for each part, a view of `rows`: an optimiser leaves alone what has no gradient in a step.
    parameters = [{part: nn.Parameter(row[division.layout.span(part)]) for part in division.trained} for row in rows]
    optimizer = make_optimizer(training, learning_rate, _groups(parameters, learning_rate, division.rates))
    for own, job in zip(parameters, jobs, strict=True):
        for part, parameter in own.items():
            if state := _state_of(part, job.optimizer_state or {}):
                optimizer.state[parameter] = _copied(state, rows.device)
    noise_std = [_noise_std(job.phase, training) for job in jobs]
    lessons = [_Lesson.of(turn, division.layout, training, noise_std) for turn in division.turns]
    for number in range(num_steps):
        lesson = lessons[number % len(lessons)]
        point = lesson.point(rows)
        gradients = torch.stack(
            _private_mean_gradients(backend, dataset, jobs, point, training, shapes, cohort, lesson)
        )
        for own, job, gradient in zip(parameters, jobs, lesson.filter.refine(gradients), strict=True):
            if job.active is not None:  # what is zero has no gradient, so this drops noise; filters may have spread it
                gradient = gradient * lesson.cut(job.active).to(gradient.device)
            for part in lesson.layout.parts:
                own[part].grad = gradient[lesson.layout.span(part)]
        optimizer.step()
        optimizer.zero_grad()
        del gradients, gradient  # or they would lie beside the next step's sums
    return [
        TrainedRow(
            row.clone(),
            _waiting(job.optimizer_state or {}, division.trained)
            | {
                f"{part}/{key}": value
                for part, parameter in own.items()
                for key, value in optimizer.state[parameter].items()
            },
        )
        for row, own, job in zip(rows, parameters, jobs, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _Lesson:
    """One of the turns of a call."""

    layout: AdapterLayout
    """Of what it trains."""
    turn: Turn | None
    positions: Tensor | None
    """Of its coordinates in the flat vector. Both are None where it trains everything."""
    filter: NoiseFilter

    @classmethod
    def of(cls, turn: Turn, layout: AdapterLayout, training: TrainingConfig, noise_std: Sequence[float]) -> Self:
        own = layout.only(turn.parts)
        everything = own is layout
        return cls(
            layout=own,
            turn=None if everything else turn,
            positions=None if everything else layout.positions(turn.parts),
            filter=make_filter(training, slot_sizes=[slot.size for slot in own.slots], noise_std=noise_std),
        )

    def point(self, rows: Tensor) -> Tensor:
        """Where gradients are taken, [K, P]."""
        if self.positions is None:
            return self.filter.point(rows)
        positions = self.positions.to(rows.device)
        return rows.index_copy(1, positions, self.filter.point(rows[:, positions]))

    def cut(self, vector: Tensor) -> Tensor:
        """The lesson's coordinates of `vector` [P]."""
        return vector if self.positions is None else vector[self.positions.to(vector.device)]


def _undivided(backend: GradientBackend) -> Division:
    """All slots of `backend` in every step, as one part."""
    shapes = {f"{number}/all": (size,) for number, size in enumerate(backend.slot_sizes)}
    layout = AdapterLayout.build(shapes, method="", rank=1, alpha=1.0)
    return Division(layout, (Turn(layout.parts),))


def _groups(
    parameters: Sequence[dict[str, nn.Parameter]], rate: float, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Parameters by part, as torch's optimisers take them, each part with its own rate."""
    return [{"params": [own[part] for own in parameters], "lr": rate * rates.get(part, 1.0)} for part in parameters[0]]


def _state_of(part: str, state: OptimizerState) -> OptimizerState:
    """What of `state` is that of `part`."""
    return {key.removeprefix(f"{part}/"): value for key, value in state.items() if key.startswith(f"{part}/")}


def _waiting(state: OptimizerState, trained: Parts) -> OptimizerState:
    """What of `state` is of parts that are not trained in this call, for those in which they are."""
    return {key: value for key, value in state.items() if key.partition("/")[0] not in trained}


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
    lesson: _Lesson,
) -> list[Tensor]:
    """One logical step: for each job (clipped sum + noise) / expected batch size, of the lesson's coordinates."""
    drawn = [job.records[job.phase.sampler.draw(len(job.records), job.sampling)] for job in jobs]
    phase, clients = jobs[0].phase, cohort or len(jobs)
    how: dict[str, Any] = {"shapes": shapes, "clients": clients, "expected": clients * training.expected_batch_size}
    totals = clipped_sums(backend, dataset, drawn, rows, phase, width=lesson.layout.size, turn=lesson.turn, **how)
    sizes = [slot.size for slot in lesson.layout.slots]
    released = privatize_all([job.phase for job in jobs], totals, [job.noise for job in jobs], sizes)
    return [gradient.div_(training.expected_batch_size) for gradient in released]


def _copied(state: OptimizerState, device: torch.device) -> OptimizerState:
    """Optimisers change their state in place, and one read from a checkpoint lies on the CPU, where `step` belongs."""
    return {
        key: value.to("cpu" if key == "step" else device, copy=True) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def make_optimizer(
    training: TrainingConfig, rate: float, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]]
) -> torch.optim.Optimizer:
    """torch's own optimiser, parameters of their own for every client: element-wise rules keep the clients apart."""
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
