"""Clipped sums over records: the one place where what a single record has to say is seen.

Each record's gradient, or a vector made of it, is clipped and added up per client at once. What comes out is private
still: `PhasePlan.privatize` makes it fit to leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.methods import Turn
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import GradientBackend
from fedlora.engine.batching import FixedShape, Shapes
from fedlora.privacy.plan import PhasePlan

Vectors = Callable[[list[Tensor], Tensor], Sequence[Tensor]]
"""From gradients (one [N, size] per slot) and owners [N] to the vectors that are clipped, as one [N, width] or more.
A record's row of the result may depend on its own row and owner alone. N is that of a fixed shape, dummies included."""


def clipped_sums(
    backend: GradientBackend,
    dataset: EncodedDataset,
    drawn: Sequence[np.ndarray],
    rows: Tensor,
    phase: PhasePlan,
    *,
    shapes: Shapes,
    clients: int | None = None,
    expected: float = math.inf,
    vectors: Vectors | None = None,
    width: int | None = None,
    turn: Turn | None = None,
) -> Tensor:
    """Sum over each client's records of their clipped vectors, [K, width] float64.

    Args:
        backend: gives the per-record gradients.
        dataset: all clients' encoded records.
        drawn: by client, positions of the records of this step, int64; possibly none.
        rows: [K, P] float32, where each client's gradients are taken.
        phase: projects and clips; the same for all clients.
        shapes: how micro-batches are cut.
        clients: of the whole cohort, of which these K may be a wave; K by default.
        expected: number of records in such a step of the whole cohort, a public one; see `Shapes.cut`.
        vectors: what is clipped; the gradients themselves by default.
        width: numbers in a record's vector; P by default.
        turn: which slots the gradients are of; all by default.
    """
    records = np.concatenate(drawn)
    owner = np.repeat(np.arange(len(drawn)), [len(part) for part in drawn])
    cohort, theta = clients or len(rows), rows.detach()
    if len(theta) == 1 < cohort:
        theta = theta.expand(2, -1)  # or the kernels of a lone client would show that the others wait
    totals = torch.zeros(len(rows), width or rows.shape[1], dtype=torch.float64, device=rows.device)
    for group in _groups(dataset, records, owner, shapes, cohort, expected, fused=backend.fuses_clients):
        batch, labels = dataset.batch(records[group.positions], rows.device, shape=(group.rows, group.columns))
        members = owner[group.positions]
        dummies = np.full(group.rows - len(members), members[0])  # they belong to anyone
        everyone = torch.from_numpy(np.concatenate([members, dummies])).to(rows.device)
        owners = everyone[: len(members)]
        gradients = backend.gradients(theta, batch, labels, everyone, turn)
        phase.add_clipped(totals, gradients if vectors is None else vectors(gradients, everyone), owners)
    return totals


def _groups(
    dataset: EncodedDataset,
    records: np.ndarray,
    owner: np.ndarray,
    shapes: Shapes,
    clients: int,
    expected: float,
    *,
    fused: bool,
) -> Iterator[FixedShape]:
    """Micro-batches over all clients or, where the back end takes one at a time, client by client."""
    lengths = dataset.lengths[records]
    if fused:
        yield from shapes.cut(lengths, dataset.longest, clients=clients, expected=expected)
        return
    for client in np.unique(owner):
        positions = np.flatnonzero(owner == client)
        for group in shapes.cut(lengths[positions], dataset.longest, clients=clients, expected=expected / clients):
            yield replace(group, positions=positions[group.positions])
