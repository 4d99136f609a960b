"""Per-record clipping: how much one record can move a sum.

The engine hands per-record gradients over as one tensor per slot; the norm is that of all slots together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

AUTOMATIC_STABILITY = 0.01  # gamma of AUTO-S
_LARGEST_NORM = 1e30  # beyond, factors would be too small for float32 to hold exactly: such a record counts as zero
_ROUNDING = 1 - 1e-6  # scaling and summing in float32 must not lift a record above clip_norm


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
            total: [K, P] float32, changed in place.
            gradients: one [N, size of slot] float32 tensor per slot, in layout order. Rows that are not finite are
                zeroed in place.
            owner: [N] int64, the row of `total` that each record belongs to.
        """
        # float64: a float32 norm of many small numbers beside a large one comes out up to 0.1 % too small.
        norms = torch.stack([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in gradients]).norm(
            dim=0
        )
        bad = ~(norms < _LARGEST_NORM)  # nan and inf too
        if bad.any():
            for part in gradients:
                part[bad] = 0.0  # 0 * nan is nan: a zero weight alone would not silence the row
        weighted_owner = torch.zeros(len(total), len(owner), device=total.device)
        weighted_owner[owner, torch.arange(len(owner), device=owner.device)] = self.weights(norms).float()
        offset = 0
        for part in gradients:
            total[:, offset : offset + part.shape[1]].addmm_(weighted_owner, part)
            offset += part.shape[1]
