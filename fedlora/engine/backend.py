"""The seam behind which per-record gradients are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from fedlora.adapters.methods import Turn

Batch = Mapping[str, Tensor]


class GradientBackend(Protocol):
    """Gives per-record gradients of the trained slots of K clients over one frozen base."""

    fuses_clients: bool
    """Whether one micro-batch may hold records of several clients."""

    @property
    def slot_sizes(self) -> tuple[int, ...]:
        """Sizes of the trained slots in layout order; they add up to P."""
        ...

    def gradients(
        self, theta: Tensor, batch: Batch, labels: Tensor, owner: Tensor, turn: Turn | None = None
    ) -> list[Tensor]:
        """Gradient of each record's own loss.

        Args:
            theta: [K, P] float32, the clients' flat vectors.
            batch: padded inputs of N >= 1 records.
            labels: [N] int64 classes or float32 targets.
            owner: [N] int64, each record's row of `theta`.
            turn: which slots are trained; all by default. Rows of `theta` agree in the parts it calls common.

        Returns:
            One [N, size of slot] float32 tensor per trained slot, in layout order.
        """
        ...

    def logits(self, theta: Tensor, batch: Batch) -> Tensor:
        """[N, num_labels] float32 under one flat vector `theta` [P], without gradients."""
        ...

    def detach(self) -> None:
        """Give the classifier back as it was before attaching, ready for another back end; this one is done.

        A second call does nothing.
        """
        ...


def record_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[N] losses: squared error where labels are floats (one output), cross-entropy where they are classes."""
    if labels.is_floating_point():
        return (logits[:, 0] - labels).square()
    return F.cross_entropy(logits, labels, reduction="none")
