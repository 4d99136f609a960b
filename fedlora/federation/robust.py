"""Rules that a few hostile clients cannot bend far. Pure functions of the clients' moves, which are noised already.

A move is a client's vector minus what the round started from; `moves` is [K, P] float32, a row for each client in
client order, every number finite (`messages.check_update` sees to that). None of them knows who is hostile, and none
helps against a majority. What a few can still do, and what honest but unlike clients lose, is in docs/aggregation.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.errors import FedloraError


def median(moves: Tensor) -> Tensor:
    """Median of each coordinate, [P]; of an even number of clients the mean of the middle two.

    Yin et al. 2018, "Byzantine-Robust Distributed Learning", algorithm 1 option I. While hostile clients are fewer than
    half, every coordinate stays between the least and the greatest of the honest.
    """
    return trimmed_mean(moves, (len(moves) - 1) // 2)


def trimmed_mean(moves: Tensor, attackers: int) -> Tensor:
    """Mean of each coordinate without its `attackers` greatest and as many least, [P].

    Yin et al. 2018, algorithm 1 option II, with the count in place of the share β = attackers / K. With no more than
    `attackers` hostile clients, every coordinate stays between the least and the greatest of the honest.

    Raises:
        FedloraError: nothing is left.
    """
    _require("trimmed_mean", len(moves), 2 * attackers + 1, attackers)
    return moves.sort(dim=0).values[attackers : len(moves) - attackers].mean(dim=0)


def multi_krum(moves: Tensor, attackers: int) -> Tensor:
    """Mean of the K - `attackers` moves that lie closest to their K - `attackers` - 2 nearest others, [P].

    Blanchard et al. 2017, "Machine Learning with Adversaries", section 4; of equal scores the first client's wins.
    With no more than `attackers` hostile clients, one of them is averaged only where it is within √(K - f - 2) D of
    an honest one, D being the largest distance between two honest moves: its score is then no worse than that of an
    honest one left out, and sums at least one distance to an honest one.

    Raises:
        FedloraError: K is less than 2 `attackers` + 3, for which nothing is shown.
    """
    _require("multi_krum", len(moves), 2 * attackers + 3, attackers)
    kept = len(moves) - attackers
    rows = moves.double()
    # Not by products of rows, whose rounding would depend on what other clients send.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    scores = distances.sort(dim=1).values[:, 1 : kept - 1].sum(dim=1)  # the first is a client's distance to itself
    chosen = scores.sort(stable=True).indices[:kept].sort().values
    return moves[chosen].mean(dim=0)


def norm_bound(moves: Tensor, bound: float | None) -> Tensor:
    """Mean of the moves, each shortened to the L2 norm `bound`; None: to that of the median client. [P].

    Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 4. One of K clients is never more of the
    result than `bound` / K long, so this limits what is sent too large, and not a patient attack of usual length. The
    median client's length (of an even number, the shorter of the middle two) is no longer than the longest honest one
    while fewer than half are hostile.
    """
    lengths = torch.linalg.vector_norm(moves, dim=1, dtype=torch.float64)
    longest = lengths.median() if bound is None else lengths.new_tensor(bound)
    shares = torch.where(lengths > longest, longest / lengths, 1.0)
    return (moves * shares.float()[:, None]).mean(dim=0)


def _require(rule: str, got: int, wanted: int, attackers: int) -> None:
    if got < wanted:
        raise FedloraError(
            f"federation.aggregator = {rule} is to withstand {attackers} among at least {wanted} clients, but "
            f"{got} answered usably; the others' own logs say why. Go on with the run when they are back, or start one "
            "with a lower federation.attackers"
        )
