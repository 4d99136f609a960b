"""Gates over modules: what DiffoRA's search measures, from the per-record gradients that training takes anyway.

With h = W x + γ_m B_m A x for each gated module m, write G_m for a record's gradient with respect to γ_m B_m. Then
dL/dB_m = γ_m G_m and dL/dγ_m = <G_m, B_m>: a search needs no other back end. At B = 0 the latter is exactly zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.adapters.slots import AdapterLayout
from fedlora.config import TrainingConfig
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import GradientBackend
from fedlora.engine.batching import Shapes
from fedlora.engine.releases import privatize_all
from fedlora.engine.sums import clipped_sums
from fedlora.engine.training import make_optimizer
from fedlora.errors import AdapterError, PrivacyError
from fedlora.privacy.noise import NoiseSource
from fedlora.privacy.plan import PhasePlan

LARGEST_GATE_LOGIT = 8.0
"""Where a gate is within 0.1 % of its ends; what noise carries further out is brought back between rounds."""


@dataclass(frozen=True)
class GatedSlots:
    """Which slots of a layout have a gate, in the order of the gates; others, such as a trained head's, have none."""

    layout: AdapterLayout
    places: tuple[int, ...]
    """Position of each gate's slot in the layout."""

    @classmethod
    def of(cls, layout: AdapterLayout, modules: Sequence[str]) -> Self:
        """One gate for the B of each of `modules`.

        Raises:
            AdapterError: the layout has no slot for one of them.
        """
        places = {slot.name: place for place, slot in enumerate(layout.slots)}
        missing = [module for module in modules if f"{module}/B" not in places]
        if missing:
            raise AdapterError(f"{len(missing)} gates without a slot, such as {missing[0]}; gate what is in the layout")
        return cls(layout, tuple(places[f"{module}/B"] for module in modules))

    def scaled(self, rows: Tensor, factors: Tensor) -> Tensor:
        """`rows` [K, P] with each gated slot multiplied by its column of `factors` [K, M]."""
        scaled = rows.clone()
        for gate, place in enumerate(self.places):
            slot = self.layout.slots[place]
            scaled[:, slot.offset : slot.offset + slot.size].mul_(factors[:, gate : gate + 1])
        return scaled

    def opened(self, rows: Tensor, logits: Tensor) -> Tensor:
        """`rows` [K, P] times the gates 2 sigmoid(`logits`) [K, M]: where a search takes its gradients."""
        return self.scaled(rows, 2 * torch.sigmoid(logits))

    def weighted(self, gradients: Sequence[Tensor], factors: Tensor, owner: Tensor) -> list[Tensor]:
        """`gradients` with each gated slot's [N, size] multiplied by its owners' `factors` [K, M]."""
        weighted = list(gradients)
        for gate, place in enumerate(self.places):
            weighted[place] = weighted[place] * factors[owner, gate].unsqueeze(1)
        return weighted

    def products(self, gradients: Sequence[Tensor], directions: Tensor, owner: Tensor) -> Tensor:
        """[N, M] float64: inner product of each record's gradient with its owner's row of `directions` [K, P].

        A sum over one record's numbers may be cut differently for another N, which has to be that of a fixed shape.
        """
        columns = []
        for place in self.places:
            slot = self.layout.slots[place]
            towards = directions[:, slot.offset : slot.offset + slot.size].double()
            columns.append(torch.linalg.vecdot(gradients[place].double(), towards[owner]))
        return torch.stack(columns, dim=1)

    def directions(self, theta: Tensor) -> Tensor:
        """`theta` [P] with each gated slot brought to length 1.

        Raises:
            AdapterError: a slot is zero, so that no direction was ever released for it.
        """
        norms = torch.stack([self.layout.view(theta, self.layout.slots[place]).norm() for place in self.places])
        if not (norms > 0).all():
            raise AdapterError(
                f"{int((norms == 0).sum())} of {len(norms)} modules have no direction to score along, since nothing "
                "was released for them yet; train all candidates before alignment (adapter.warmup_rounds)"
            )
        return self.scaled(theta[None], 1 / norms[None])[0]


def alignment_sums(
    backend: GradientBackend,
    dataset: EncodedDataset,
    records: Sequence[np.ndarray],
    *,
    start: Tensor,
    directions: Tensor,
    gated: GatedSlots,
    phase: PhasePlan,
    shapes: Shapes,
) -> Tensor:
    """How far each module, moved along its direction from `start`, would lower the loss: [K, M], private until noised.

    A record's vector is -<G_m, U_m> over all modules m, clipped as a whole. It is the first gate gradient of a bilevel
    search whose weights have taken one step along U.

    Args:
        backend, dataset, shapes: as in `clipped_sums`.
        records: positions of each client's records, as drawn.
        start: [P] float32, where gradients are taken: B = 0, and a trained head as it is by now.
        directions: [P] float32, of `GatedSlots.directions`; released, thus public.
        gated: the modules that get a score.
        phase: clips.
    """
    toward = directions[None].expand(len(records), -1)
    return clipped_sums(
        backend,
        dataset,
        records,
        start.repeat(len(records), 1),
        phase,
        shapes=shapes,
        vectors=lambda gradients, owner: [-gated.products(gradients, toward, owner)],
        width=len(gated.places),
    )


@dataclass(kw_only=True)
class SearchJob:
    """One client's share of a bilevel search: two disjoint sets of records, their plan and its secret streams."""

    weight_records: np.ndarray
    gate_records: np.ndarray
    phase: PhasePlan
    """Of the weights; `phase.beside` is that of the gates."""
    sampling: np.random.Generator = field(repr=False)
    noise: NoiseSource = field(repr=False)

    @property
    def gate_phase(self) -> PhasePlan:
        """Its own sampling rate and noise: sites of other sizes have others.

        Raises:
            PrivacyError: the plan has none.
        """
        if self.phase.beside is None:
            raise PrivacyError(f"phase {self.phase.name} plans no steps of gates; search under a plan of bilevel")
        return self.phase.beside


def search(
    backend: GradientBackend,
    dataset: EncodedDataset,
    jobs: Sequence[SearchJob],
    theta: Tensor,
    logits: Tensor,
    gated: GatedSlots,
    *,
    num_steps: int,
    learning_rate: float,
    gate_learning_rate: float,
    training: TrainingConfig,
    shapes: Shapes,
    cohort: int | None = None,
) -> list[Tensor]:
    """Weights and gates in turn, one private step each, `num_steps` times; first order (DARTS without unrolling).

    Gates are γ = 2 sigmoid(logit): 1 at a logit of 0, where a warm-up without gates has left the weights. They take
    plain steps: sums of noised gradients keep their order, which an optimiser that rescales coordinates would not.

    Args:
        backend, dataset, shapes: as in `clipped_sums`.
        jobs: one per client.
        theta: [P] float32, common start of the weights.
        logits: [M] float32, common start of the gates.
        gated: which slots the gates multiply.
        num_steps: of each of the two.
        learning_rate, training: of the weights.
        gate_learning_rate: of the gates.
        cohort: clients of the round, where these jobs are a wave of it.

    Returns:
        Per client its weights and then its gates' logits, [P + M] float32.

    Raises:
        PrivacyError: the jobs' phases clip differently, or one plans no steps of gates.
    """
    phase, gate_phase = jobs[0].phase, jobs[0].gate_phase
    if len({(job.phase.clipping, job.phase.projection, job.gate_phase.clipping) for job in jobs}) > 1:
        raise PrivacyError("jobs of one search project or clip differently; search in separate calls")
    rows, gate_rows = theta.repeat(len(jobs), 1), logits.repeat(len(jobs), 1)
    parameters = [nn.Parameter(row) for row in rows]  # views: a step moves `rows`
    optimizer = make_optimizer(training, learning_rate, parameters)
    clients = cohort or len(jobs)
    batch_size, noise = training.expected_batch_size, [job.noise for job in jobs]

    def weight_sums(gates: Tensor) -> Tensor:
        drawn = [_draw(job.phase, job.weight_records, job.sampling) for job in jobs]
        return clipped_sums(
            backend,
            dataset,
            drawn,
            gated.scaled(rows, gates),
            phase,
            shapes=shapes,
            clients=clients,
            expected=clients * batch_size,
            vectors=lambda gradients, owner: gated.weighted(gradients, gates, owner),
        )

    def gate_sums(gates: Tensor) -> Tensor:
        drawn = [_draw(job.gate_phase, job.gate_records, job.sampling) for job in jobs]
        slopes = (gates * (1 - gates / 2)).double()  # of each gate over its logit
        return clipped_sums(
            backend,
            dataset,
            drawn,
            gated.scaled(rows, gates),
            gate_phase,
            shapes=shapes,
            clients=clients,
            expected=clients * batch_size,
            vectors=lambda gradients, owner: [gated.products(gradients, rows.detach(), owner) * slopes[owner]],
            width=logits.numel(),
        )

    for _ in range(num_steps):
        gates = 2 * torch.sigmoid(gate_rows)
        released = privatize_all([job.phase for job in jobs], weight_sums(gates), noise, backend.slot_sizes)
        for parameter, gradient in zip(parameters, released, strict=True):
            parameter.grad = gradient.div_(batch_size)
        optimizer.step()
        released = privatize_all([job.gate_phase for job in jobs], gate_sums(gates), noise, (logits.numel(),))
        for row, gradient in zip(gate_rows, released, strict=True):
            row.sub_(gradient, alpha=gate_learning_rate / batch_size)
    return list(torch.cat([rows.detach(), gate_rows], dim=1))


def _draw(phase: PhasePlan, records: np.ndarray, sampling: np.random.Generator) -> np.ndarray:
    drawn: np.ndarray = records[phase.sampler.draw(len(records), sampling)]
    return drawn
