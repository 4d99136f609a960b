"""How many clients' training fits into a device at once.

A call of the engine with K clients takes the memory of its largest micro-batch and, beside that, some rows of P numbers
for each client. Both are measured on a few blank rows and a few clients, so that nothing has to be kept in step with
the engine's code, and the trial itself takes little. All of it is public: shapes of micro-batches do not depend on
records (`engine.batching`), and no record is touched.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import GradientBackend
from fedlora.engine.batching import Shapes, columns_of, most_rows
from fedlora.engine.device_memory import free_bytes, peak_bytes
from fedlora.engine.sums import Vectors, clipped_sums
from fedlora.privacy.plan import PhasePlan

_SHARE_OF_DEVICE, _SHARE_OF_HOST = 0.8, 0.5
"""Of what is free. Memory is cut into blocks, Python frees some of it late, and a host has others on it."""
_CLIENTS = 8, 16
"""Of a trial. So many that what they hold together exceeds what the noise of one takes for a moment."""


@dataclass(frozen=True)
class MicroBatch:
    """Bytes of a micro-batch of `columns` tokens: `fixed`, and `row` for each record."""

    columns: int
    fixed: float
    row: float


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that a call of the engine takes on its device, beside what lies there already."""

    client: int
    micro_batches: tuple[MicroBatch, ...]
    """Of the narrowest and the widest: in between none is larger, as the product of rows and columns is bounded."""
    token_budget: int
    """Padded tokens of a micro-batch."""
    fused: bool
    """Whether clients share micro-batches."""

    def of_call(self, clients: int, batch_size: float) -> float:
        """Bytes of a call with `clients`, each of which expects `batch_size` records in a step."""
        shapes, expected = Shapes(self.token_budget), batch_size * (clients if self.fused else 1)
        largest = max(
            batch.fixed + batch.row * shapes.row_counts(batch.columns, clients, expected)[-1]
            for batch in self.micro_batches
        )
        return largest + clients * self.client


def rough_footprint(backend: GradientBackend, *, weights: int, token_budget: int) -> Footprint:
    """A bound far above what encoders and decoders take. Where even that fits, nothing needs to be measured.

    A micro-batch of 4,096 tokens of RoBERTa-large takes some 15 times the bytes of the weights, one of 1,024 of MiniLM
    1.3 times; a client 5 to 10 times those of its row.

    Args:
        backend: whose gradients it is to give.
        weights: bytes of the base model.
        token_budget: padded tokens of a micro-batch.
    """
    size = sum(backend.slot_sizes)
    batch = MicroBatch(columns=1, fixed=64 * weights + 2**26, row=32 * size)
    return Footprint(client=128 * size, micro_batches=(batch,), token_budget=token_budget, fused=backend.fuses_clients)


def measure_footprint(
    backend: GradientBackend,
    phase: PhasePlan,
    theta: Tensor,
    train: Callable[[int], object],
    *,
    token_budget: int,
    longest: int,
    classes: bool,
    vectors: Vectors | None = None,
) -> Footprint:
    """What a call takes, by trial.

    Args:
        backend, phase, vectors: as in `clipped_sums`.
        theta: [P] float32, on the device.
        train: does a round's training for so many clients without any record.
        token_budget: padded tokens of a micro-batch.
        longest: tokens that the model can take.
        classes: whether labels are classes, and not scores.
    """
    rows = theta.repeat(2, 1)  # of one client, adapters would not be copied for each record

    def step(count: int, columns: int) -> int:
        records = _blank(count - 1, columns, classes=classes)
        drawn = [np.arange(len(records)), np.arange(0)]
        shapes = Shapes(count * columns)
        return peak_bytes(
            theta.device, lambda: clipped_sums(backend, records, drawn, rows, phase, shapes=shapes, vectors=vectors)
        )

    micro_batches = []
    narrowest = int(columns_of(np.ones(1, np.int64), longest)[0])
    for columns in sorted({narrowest, longest}):
        most = most_rows(columns, token_budget)
        few, more = max(2, most // 8), max(3, most // 4)
        small, large = step(few, columns), step(more, columns)
        row = (large - small) / (more - few)
        micro_batches.append(MicroBatch(columns, small - few * row, row))
    few, more = _CLIENTS
    least, most = (peak_bytes(theta.device, partial(train, count)) for count in _CLIENTS)
    return Footprint(
        client=-(-(most - least) // (more - few)),
        micro_batches=tuple(micro_batches),
        token_budget=token_budget,
        fused=backend.fuses_clients,
    )


def usable_bytes(device: torch.device) -> float:
    """What a call may take on `device` by now: a share of what is free."""
    return free_bytes(device) * (_SHARE_OF_DEVICE if device.type == "cuda" else _SHARE_OF_HOST)


def most_clients(footprint: Footprint, usable: float, clients: int, batch_size: float) -> int:
    """How many of `clients` one call can take in `usable` bytes; 0 where not one.

    Args:
        footprint: of a call.
        usable: bytes.
        clients: K, not all of whom need to fit.
        batch_size: expected records of a client in a step.
    """
    counts = range(1, clients + 1)
    return bisect_right(counts, usable, key=lambda count: footprint.of_call(count, batch_size))


def _blank(count: int, columns: int, *, classes: bool) -> EncodedDataset:
    """Records of the same `columns` tokens; what they are does not matter to memory."""
    return EncodedDataset(
        ids=np.zeros(columns, np.int32),
        starts=np.zeros(count, np.int64),
        lengths=np.full(count, columns),
        labels=np.zeros(count, np.int64 if classes else np.float32),
        pad_token_id=0,
        longest=columns,
    )
