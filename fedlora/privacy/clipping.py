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


@dataclass(frozen=True)
class Clipping:
    """Scales each record's vector to L2 norm at most `clip_norm`.

    `flat` is min(1, C/|g|) (Abadi et al. 2016, Algorithm 1); `automatic` is C/(|g| + 0.01), which has no threshold to
    tune (Bu et al. 2023, AUTO-S, with its output scaled from 1 to C).

    Guarantees: adding or removing one record moves the clipped sum by at most `clip_norm`; a record whose gradient is
    not finite contributes exactly zero.
    """

    kind: Literal["flat", "automatic"]
    clip_norm: float

    def weights(self, norms: Tensor) -> Tensor:
        """Factor in [0, C/|g|] for each of `norms` [N]; 0 where the norm is not finite."""
        if self.kind == "flat":
            factor = (self.clip_norm / norms).clamp(max=1.0)
        else:
            factor = self.clip_norm / (norms + AUTOMATIC_STABILITY)
        return torch.where(torch.isfinite(norms), factor, torch.zeros_like(norms))

    def add_clipped(self, total: Tensor, gradients: Sequence[Tensor], owner: Tensor) -> None:
        """Add every record's clipped gradient to its owner's row of `total`.

        Args:
            total: [K, P] float32, changed in place.
            gradients: one [N, size of slot] float32 tensor per slot, in layout order. Rows that are not finite are
                zeroed in place.
            owner: [N] int64, the row of `total` that each record belongs to.
        """
        norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in gradients]).norm(dim=0)
        bad = ~torch.isfinite(norms)
        if bad.any():
            for part in gradients:
                part[bad] = 0.0  # 0 * nan is nan: a zero weight alone would not silence the row
        weighted_owner = torch.zeros(len(total), len(owner), device=total.device)
        weighted_owner[owner, torch.arange(len(owner), device=owner.device)] = self.weights(norms)
        offset = 0
        for part in gradients:
            total[:, offset : offset + part.shape[1]].addmm_(weighted_owner, part)
            offset += part.shape[1]
