"""Counts of right and wrong predictions on held-out private records, and what noised counts say of the accuracy.

A record is 1 in one cell of the confusion matrix, so adding or removing it moves the released vector by exactly 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.slots import AdapterLayout
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import GradientBackend
from fedlora.engine.batching import Shapes

LEAST_SIGNAL = 5.0
"""How many standard deviations of its noise the noised number of records must reach to be divided by: noise alone does
so once in 3 million times, and the ratio's bias, of order 1 / LEAST_SIGNAL², is then small beside its error."""


def confusion_layout(num_labels: int) -> AdapterLayout:
    """What a site releases: `confusion` [C, C], true classes by predicted ones."""
    shapes = {"evaluation/confusion": (num_labels, num_labels)}
    return AdapterLayout.build(shapes, method="evaluation", rank=1, alpha=1.0)


@torch.no_grad()
def confusion_counts(
    backend: GradientBackend,
    dataset: EncodedDataset,
    records: np.ndarray,
    theta: Tensor,
    layout: AdapterLayout,
    shapes: Shapes,
) -> Tensor:
    """Un-noised counts of `theta`'s predictions [P] on `records`, flat [C * C] float64: private until noised.

    A record that changed the rounding of others' logits could move them to another cell, and the sensitivity would not
    be 1: `shapes` are fixed as in training, and have seen that it changes nothing or take records one by one. Whatever
    the logits are, not finite ones too, a record counts in one cell.
    """
    total = torch.zeros(layout.size, dtype=torch.float64, device=theta.device)
    confusion = layout.view(total, layout.slots[0])
    for group in shapes.cut_full(dataset.lengths[records], dataset.longest, "logits"):
        own = records[group.positions]
        batch, labels = dataset.batch(own, theta.device, shape=(group.rows, group.columns))
        predicted = backend.logits(theta, batch).argmax(dim=1)
        confusion.index_put_((labels[: len(own)], predicted[: len(own)]), confusion.new_ones(len(own)), accumulate=True)
    return total


@dataclass(frozen=True, kw_only=True)
class PrivateEvaluation:
    """What the clients' noised counts say together. All of it is post-processing of the releases."""

    accuracy: float | None
    """Estimated on the clients' held-out records, as it comes: noise can put it a little outside 0 to 1. None where it
    cannot be measured."""
    standard_error: float | None
    """Of `accuracy`, for records like those held out: their chance and the noise together."""
    noise_std: float
    """Standard deviation of the noise in one cell of `confusion`."""
    clients: int
    """How many answered."""
    num_cells: int
    confusion: list[list[float]]
    """Sum of the clients' noised counts [C, C], true classes by predicted ones."""
    note: str
    """Why there is no accuracy; empty where there is one."""


def estimate_accuracy(confusion: Tensor, *, noise_std: float, clients: int) -> PrivateEvaluation:
    """The share of right predictions from a noised confusion matrix, and its standard error.

    With D = trace, N = sum and a = D / N, to first order in the noise (delta method; Z is the noise of standard
    deviation s in each of C² cells, independent):

        a - true = [(1 - a) Σ Z on the diagonal - a Σ Z off it] / N + the error of sampling N records
        variance = s² C [(1 - a)² + (C - 1) a²] / N² + a (1 - a) / N

    In the variance a is (D + 1) / (N + 2), kept within 0 and 1, since no finite sample shows that nothing can go wrong.

    Args:
        confusion: [C, C] float64, the sum of the clients' releases.
        noise_std: s, in that sum.
        clients: how many releases it is the sum of.
    """
    classes = len(confusion)
    right, total = float(confusion.trace()), float(confusion.sum())
    spread = noise_std * classes  # of the sum over C² cells
    accuracy = error = None
    note = ""
    if clients == 0:
        note = "not measurable: no client's answer arrived"
    elif total <= LEAST_SIGNAL * spread:
        note = (
            f"not measurable: noise σ·C·√clients = {spread:.1f} on the number of held-out records, which came out as "
            f"{total:.1f}, not above {LEAST_SIGNAL:g} times that"
        )
    else:
        accuracy = right / total
        smoothed = min(max((right + 1) / (total + 2), 0.0), 1.0)
        noise = noise_std**2 * classes * ((1 - smoothed) ** 2 + (classes - 1) * smoothed**2) / total**2
        error = math.sqrt(noise + smoothed * (1 - smoothed) / total)
    return PrivateEvaluation(
        accuracy=accuracy,
        standard_error=error,
        noise_std=noise_std,
        clients=clients,
        num_cells=classes**2,
        confusion=confusion.tolist(),
        note=note,
    )
