"""What the server does with the vectors it got. Pure functions of already noised, public quantities."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.config.sections import FederationConfig
from fedlora.errors import ProtocolError
from fedlora.federation.messages import LARGEST_VALUE, ClientUpdate
from fedlora.federation.robust import median, multi_krum, norm_bound, trimmed_mean

logger = logging.getLogger(__name__)

TIMES_AS_FAR = 50.0
"""As the median client's move from the global state: how far an honest one may get. Noise alone makes moves of small
and large sites differ by a factor of about 15 at one ε."""

TIMES_AS_LARGE = 5.0
"""As the median client: the most that the size it tells makes a client weigh. Nobody can check that size, so this is
how much of the mean a lie buys: 5 / (K + 4) of it among clients of one size, and no more than 5 / (5 + K // 2) ever."""


def aggregate(updates: Sequence[ClientUpdate], start: Tensor | None, config: FederationConfig) -> Tensor:
    """The clients' vectors made one, [P], as `config.aggregator` and `config.weights` say; no bit depends on arrival.

    Args:
        updates: of one round, each checked.
        start: what the round started from, [P]. None: the vectors are sums over records, as for a prototype, in which
            a client's size weighs already and whose length is no move's, so that `weights` and `norm_bound` do not
            apply.

    Raises:
        ProtocolError: a client does not tell its size, and `config.weights` needs it.
        FedloraError: too few answered for the rule to withstand `config.attackers`.
    """
    if config.aggregator == "mean" and (start is None or config.weights == "uniform"):
        return uniform_mean(updates)
    vectors = torch.stack([update.vector for update in _ordered(updates)])
    bound = None if start is None or config.norm_bound == "auto" else config.norm_bound
    start = torch.zeros_like(vectors[0]) if start is None else start
    match config.aggregator:
        case "mean":
            return weighted_mean(vectors, client_weights(updates, config))
        case "median":
            return start + median(vectors - start)
        case "trimmed_mean":
            return start + trimmed_mean(vectors - start, config.assumed_attackers)
        case "multi_krum":
            return start + multi_krum(vectors - start, config.assumed_attackers)
        case "norm_bound":
            return start + norm_bound(vectors - start, bound)


def client_weights(updates: Sequence[ClientUpdate], config: FederationConfig) -> Tensor:
    """What each client weighs in a mean, [K] float64 in client order, 1 in total.

    Raises:
        ProtocolError: as `told_size`, for the first client it holds of.
    """
    ordered = _ordered(updates)
    if config.weights == "uniform":
        return torch.full((len(ordered),), 1 / len(ordered), dtype=torch.float64)
    sizes = {update.client: told_size(update) for update in ordered}
    most = TIMES_AS_LARGE * statistics.median_low(sizes.values())  # of two, the larger must not vouch for itself
    for client, size in sizes.items():
        if size > most:
            logger.warning(
                "client %d tells %d records, more than %g times the median client: it weighs as much as %d",
                *(client, size, TIMES_AS_LARGE, most),
            )
    weights = torch.tensor([min(size, most) for size in sizes.values()], dtype=torch.float64)
    return weights / weights.sum()


def told_size(update: ClientUpdate) -> int:
    """How many records a client says it has, at least 1.

    Raises:
        ProtocolError: it does not say, or has none.
    """
    size = update.facts.get("num_examples")
    if not size:
        raise ProtocolError(
            f"client {update.client} tells {'no number of records' if size is None else 'that it has no records'}, but "
            "federation.weights = public_size weighs by it; its site can make it public in its policy, "
            "or set federation.weights=uniform"
        )
    return int(size)


def exact_sum(updates: Sequence[ClientUpdate]) -> Tensor:
    """Sum of the clients' vectors [P], in float64 and in client order."""
    return torch.stack([update.vector.double() for update in _ordered(updates)]).sum(dim=0)


def uniform_mean(updates: Sequence[ClientUpdate]) -> Tensor:
    """Mean of the clients' vectors [P], in client order so that float sums do not depend on arrival.

    With FFA's common A, the mean of B gives exactly the mean of the products B A. Weights are equal by default:
    weighting by the number of records needs it published and changes each site's influence.
    """
    return torch.stack([update.vector for update in _ordered(updates)]).mean(dim=0)


def weighted_mean(vectors: Tensor, weights: Tensor) -> Tensor:
    """Mean of the rows of `vectors` [K, P] by `weights` [K], which are not negative; added up in float64, [P] float32.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks", algorithm 1.
    """
    total = torch.zeros(vectors.shape[1], dtype=torch.float64)
    for vector, weight in zip(vectors, (weights / weights.sum()).tolist(), strict=True):
        total.add_(vector, alpha=weight)
    return total.float()


def outlying(updates: Sequence[ClientUpdate], theta: Tensor, num_weights: int) -> dict[int, str]:
    """Clients whose vector no site would take back as a global state, or that moved absurdly far from `theta`; and why.

    A safety net against broken or blunt clients, not robust aggregation: within the bounds one of K clients still moves
    the mean by TIMES_AS_FAR / K median moves.

    Args:
        updates: of one round of training.
        theta: what it started from; as the updates' vectors, [P] or, in a bilevel search, [P + M].
        num_weights: P.
    """
    largest = {update.client: float(update.vector[:num_weights].abs().max()) for update in updates}
    moves = {update.client: float((update.vector - theta).norm()) for update in updates}
    usual = statistics.median(moves.values()) if moves else 0.0
    found: dict[int, str] = {}
    for client, move in moves.items():
        if largest[client] > LARGEST_VALUE:
            found[client] = f"a value of {largest[client]:g}, beyond ±{LARGEST_VALUE:g}"
        elif move > TIMES_AS_FAR * usual > 0:
            found[client] = f"a move of length {move:g}, over {TIMES_AS_FAR:g} times the median client's {usual:g}"
    return found


def _ordered(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    return sorted(updates, key=lambda update: update.client)
