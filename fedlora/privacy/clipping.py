"""Per-record clipping: how much one record can move a sum.

The engine hands per-record gradients over as one tensor per slot; the norm is that of all slots together.

Rounding is part of sensitivity: the float sum of many records depends on their order and on how it was split, so that
one record more can move it by more than its own length (Casacuberta et al. 2022, "Widespread Underestimation of
Sensitivity in Differentially Private Libraries and How to Fix It"). Sums are therefore float64, and every record is
cut a little shorter than it might be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AUTOMATIC_STABILITY = 0.01  # gamma of AUTO-S
_LARGEST_NORM = 1e30  # beyond, a record counts as zero
_FEW_OWNERS = 48
# Summing N vectors of length at most C in float64, in whatever order, errs by at most N^2 C 2^-53 in L2. The sums of
# two neighbours thus err by no more than this slack of C together as long as a batch has at most 60,000 records.
_ROUNDING = 1 - 1e-6


@dataclass(frozen=True)
class Clipping:
    """Scales each record's vector to L2 norm at most `clip_norm`.

    `flat` is min(1, C/|g|) (Abadi et al. 2016, Algorithm 1); `automatic` is C/(|g| + 0.01), which has no threshold to
    tune (Bu et al. 2023, AUTO-S, with its output scaled from 1 to C).

    Guarantees: adding or removing one record moves the clipped sum by at most `clip_norm`; a record whose gradient is
    not finite, or of a norm above 1e30, contributes exactly zero.
    """

    kind: Literal["flat", "automatic"]
    clip_norm: float

    def weights(self, norms: Tensor) -> Tensor:
        """Factor in [0, C/|g|] for each of `norms` [N] float64; 0 where the norm is not finite or above 1e30."""
        if self.kind == "flat":
            factor = (self.clip_norm / norms).clamp(max=1.0)
        else:
            factor = self.clip_norm / (norms + AUTOMATIC_STABILITY)
        return torch.where(norms < _LARGEST_NORM, factor * _ROUNDING, torch.zeros_like(norms))

    def add_clipped(self, total: Tensor, gradients: Sequence[Tensor], owner: Tensor) -> None:
        """Add every record's clipped gradient to its owner's row of `total`.

        Args:
            total: [K, P] float64, changed in place.
            gradients: one [N, size of slot] float32 tensor per slot, in layout order. Rows that are not finite are
                zeroed in place.
            owner: [N] int64, the row of `total` that each record belongs to.
        """
        # float64: a float32 norm of many small numbers beside a large one comes out up to 0.1 % too small.
        norms = torch.stack([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in gradients]).norm(
            dim=0
        )
        bad = ~(norms < _LARGEST_NORM)  # nan and inf too
        if total.is_cuda or bad.any():  # to look would make the host wait for the device
            for part in gradients:
                part.masked_fill_(bad[:, None], 0.0)  # 0 * nan is nan: a zero weight alone would not silence the row
        weights, offset = self.weights(norms), 0
        by_owner = None if _row_by_row(total) else F.one_hot(owner, len(total)).T * weights
        for part in gradients:
            own = total[:, offset : offset + part.shape[1]]
            if by_owner is None:
                own.index_add_(0, owner, part.double().mul_(weights[:, None]))
            else:
                own.addmm_(by_owner, part.double())
            offset += part.shape[1]


def _row_by_row(total: Tensor) -> bool:
    """Whether adding each record to its owner's row is faster than one product with a matrix of zeros but for owners.

    On an accelerator it would be added in an order that differs from run to run.
    """
    return len(total) > _FEW_OWNERS and not total.is_cuda
