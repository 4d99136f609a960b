"""Algebra of products B A by their factors: the full [d_out, d_in] product is made only where a base is to take it in.

All of it works on what was noised before (post-processing), or on public numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Split = Literal["orthonormal", "balanced"]


def truncated(outer: Tensor, inner: Tensor, rank: int, split: Split) -> tuple[Tensor, Tensor]:
    """The best approximation of `outer @ inner` of at most `rank`, as B [d_out, rank] and A [rank, d_in], float32.

    Where the product has that rank or less, B A is the product, up to rounding.

    Args:
        outer: [d_out, q].
        inner: [q, d_in].
        rank: as in `singular`.
        split: "orthonormal": A has orthonormal rows and B the singular values (FedSVD); "balanced": the roots of the
            singular values go to both (FedASK).
    """
    columns, values, rows = singular(outer, inner, rank)
    if split == "orthonormal":
        return (columns * values).float(), rows.float()
    return (columns * values.sqrt()).float(), (values.sqrt()[:, None] * rows).float()


def singular(outer: Tensor, inner: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular vectors and values of `outer @ inner`: U [d_out, rank], s [rank], Vᵀ [rank, d_in], float64.

    By QR of both factors and an SVD of the small product in between: O((d_out + d_in) q²) for an inner dimension of q.
    Signs are fixed, by the largest entry of each row of Vᵀ, so that machines agree.

    Args:
        outer: [d_out, q].
        inner: [q, d_in].
        rank: at most the smaller of d_out and d_in; beyond q, all are zero.
    """
    left, upper = torch.linalg.qr(outer.double())
    right, lower = torch.linalg.qr(inner.double().T)
    u, values, vt = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    columns, rows = (left @ u)[:, :rank], (vt @ right.T)[:rank]
    signs = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
    beyond = (0, rank - len(rows))
    return F.pad(columns * signs.T, beyond), F.pad(values[:rank], beyond), F.pad(rows * signs, (0, 0, *beyond))


def stacked(outers: Sequence[Tensor], inners: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors of sum_k w_k B_k A_k, whatever the ranks: the weighted B_k side by side, the A_k one below the other.

    FLoRA's aggregation (arXiv 2409.05976, section 3.2).

    Args:
        outers: B_k [d_out, r_k].
        inners: A_k [r_k, d_in].
        weights: w_k.

    Returns:
        [d_out, sum r_k] and [sum r_k, d_in], float64.
    """
    weighted = [outer.double() * weight for outer, weight in zip(outers, weights, strict=True)]
    return torch.cat(weighted, dim=1), torch.cat([inner.double() for inner in inners])
