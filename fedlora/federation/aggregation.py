"""What the server does with the vectors it got. Pure functions of already noised, public quantities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.federation.messages import ClientUpdate


def exact_sum(updates: Sequence[ClientUpdate]) -> Tensor:
    """Sum of the clients' vectors [P], in float64 and in client order."""
    ordered = sorted(updates, key=lambda update: update.client)
    return torch.stack([update.vector.double() for update in ordered]).sum(dim=0)


def uniform_mean(updates: Sequence[ClientUpdate]) -> Tensor:
    """Mean of the clients' vectors [P], in client order so that float sums do not depend on arrival.

    With FFA's common A, the mean of B gives exactly the mean of the products B A. Weights are equal on purpose:
    weighting by the number of records would publish it and change each site's influence.
    """
    ordered = sorted(updates, key=lambda update: update.client)
    return torch.stack([update.vector for update in ordered]).mean(dim=0)
