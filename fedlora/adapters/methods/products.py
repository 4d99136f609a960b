"""Algebra of products B A by their factors: the full [d_out, d_in] product is made only where a base is to take it in.

All of it works on what was noised before (post-processing), or on public numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Split = Literal["orthonormal", "balanced"]


def truncated(outer: Tensor, inner: Tensor, rank: int, split: Split) -> tuple[Tensor, Tensor]:
    """The best approximation of `outer @ inner` of at most `rank`, as B [d_out, rank] and A [rank, d_in], float32.

    By QR of both factors and an SVD of the small product in between: O((d_out + d_in) q²) for an inner dimension of q.
    Where the product has that rank or less, B A is the product, up to rounding. Signs are fixed, by the largest entry
    of each row of A, so that machines agree.

    Args:
        outer: [d_out, q].
        inner: [q, d_in].
        rank: at most the smaller of d_out and d_in; beyond q, rows and columns are zero.
        split: "orthonormal": A has orthonormal rows and B the singular values (FedSVD); "balanced": the roots of the
            singular values go to both (FedASK).
    """
    left, upper = torch.linalg.qr(outer.double())
    right, lower = torch.linalg.qr(inner.double().T)
    u, values, vt = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    kept = min(rank, len(values))
    columns, rows = (left @ u)[:, :kept], (vt @ right.T)[:kept]
    signs = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
    weights = values[:kept] if split == "orthonormal" else values[:kept].sqrt()
    b = outer.new_zeros(len(outer), rank, dtype=torch.float32)
    a = outer.new_zeros(rank, inner.shape[1], dtype=torch.float32)
    b[:, :kept] = columns * signs.T * weights
    a[:kept] = rows * signs if split == "orthonormal" else rows * signs * weights[:, None]
    return b, a


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
