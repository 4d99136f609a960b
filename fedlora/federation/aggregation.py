"""What the server does with the vectors it got. Pure functions of already noised, public quantities."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.federation.messages import LARGEST_VALUE, ClientUpdate

TIMES_AS_FAR = 50.0
"""As the median client's move from the global state: how far an honest one may get. Noise alone makes moves of small
and large sites differ by a factor of about 15 at one ε."""


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


def outlying(updates: Sequence[ClientUpdate], theta: Tensor, num_weights: int) -> list[int]:
    """Clients whose vector no site would take back as a global state, or that moved absurdly far from `theta`.

    A safety net against broken or blunt clients, not robust aggregation: within the bounds one of K clients still moves
    the mean by TIMES_AS_FAR / K median moves.

    Args:
        updates: of one round of training.
        theta: what it started from; as the updates' vectors, [P] or, in a bilevel search, [P + M].
        num_weights: P.
    """
    too_large = {update.client for update in updates if update.vector[:num_weights].abs().max() > LARGEST_VALUE}
    moves = {update.client: float((update.vector - theta).norm()) for update in updates}
    bound = TIMES_AS_FAR * statistics.median(moves.values()) if moves else 0.0
    too_far = {client for client, move in moves.items() if move > bound > 0}
    return sorted(too_large | too_far)
