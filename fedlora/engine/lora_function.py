"""An adapted linear map as one node of the autograd graph: forward, input gradient and per-record gradients by hand.

The same numbers as torch's own differentiation up to rounding, with fewer passes over memory: the low-rank part is
added in place, both ways, and of the input only u = x Aᵀ is kept, and x itself where A is trained. A step on MiniLM
takes 1 to 5 % less (docs/decisions.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class LoraFunction(torch.autograd.Function):
    """y = x Wᵀ + b + scale · u B_iᵀ with u = x A_iᵀ, and of B_i and A_i the gradients that are record i's own.

    That of B_i is scale · g_iᵀ u_i, that of A_i scale · (g_i B_i)ᵀ x_i.
    """

    @staticmethod
    def forward(
        x: Tensor, outer: Tensor, inner: Tensor, weight: Tensor, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output and u.

        Args:
            x: [N, T, d_in], of the dtype of all the others.
            outer: [N, d_out, r], one B per record; with a first stride of 0 where all records have the same.
            inner: [N, r, d_in], one A per record; likewise.
            weight: [d_out, d_in], frozen.
            bias: [d_out], frozen, or None.
            scale: of the low-rank part.
        """
        output, u = F.linear(x, weight, bias), _times(x, inner.transpose(1, 2))
        _add(output, u, outer.transpose(1, 2), scale)
        return output, u

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, outer, inner, weight, _, scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, output[1], outer, inner, weight)
        ctx.scale = scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, u, outer, inner, weight = ctx.saved_tensors
        for_input, for_outer, for_inner = ctx.needs_input_grad[:3]
        back = of_outer = of_inner = None
        if for_outer:
            of_outer = _scaled_product(gradient.transpose(1, 2), u, ctx.scale)
        if for_input or for_inner:
            low = _times(gradient, outer)  # [N, T, r]
        if for_inner:
            of_inner = _scaled_product(low.transpose(1, 2), x, ctx.scale)
        if for_input:
            back = gradient @ weight
            _add(back, low, inner, ctx.scale)
        return back, of_outer, of_inner, None, None, None


def _times(rows: Tensor, factors: Tensor) -> Tensor:
    """[N, T, n] of `rows` [N, T, m] and each record's factor [N, m, n]."""
    return rows @ factors[0] if _common(factors) else torch.bmm(rows, factors)


def _add(total: Tensor, rows: Tensor, factors: Tensor, scale: float) -> None:
    """Add scale times `_times(rows, factors)` to `total` in place."""
    if _common(factors):
        total.flatten(0, 1).addmm_(rows.flatten(0, 1), factors[0], alpha=scale)
    else:
        total.baddbmm_(rows, factors, alpha=scale)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale times each record's product of `left` [N, m, t] and `right` [N, t, n], [N, m, n], rounded once."""
    out = left.new_empty(len(left), left.shape[1], right.shape[2])
    return out.baddbmm_(left, right, beta=0, alpha=scale)


def _common(factors: Tensor) -> bool:
    """Whether all records of the micro-batch share one factor, so that one matrix product serves them."""
    return factors.stride(0) == 0
