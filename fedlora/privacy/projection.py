"""Low-pass projection of gradients before they are clipped.

Idea of Spectral-DP (Feng et al., IEEE S&P 2023, arXiv 2307.13231): keep the low frequencies of the gradient only.
There the filter follows the noise; here every record's gradient is projected before it is clipped, and the noised sum
once more. The projection does not depend on data, so a record still moves the sum by at most C, and the noise outside
of the subspace is dropped as post-processing. What is gained: the clip norm is not spent on what is dropped, and less
noise is kept. What is lost: the energy above the cut. For matrices whose rows and columns have no order, as those of
LoRA, no frequency is known to matter more than another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowPass:
    """Orthogonal projection of a slot onto its lowest ceil(share · bins) of bins = size // 2 + 1 frequencies.

    A bin of the real transform stands for a frequency and its conjugate, so what is kept is real again.
    """

    share: float

    def __call__(self, values: Tensor) -> Tensor:
        """`values` [..., size of a slot], each row projected; norms never grow."""
        size = values.shape[-1]
        kept = self._kept_bins(size)
        if kept == size // 2 + 1:
            return values
        spectrum = torch.fft.rfft(values, norm="ortho")
        spectrum[..., kept:] = 0
        low: Tensor = torch.fft.irfft(spectrum, n=size, norm="ortho")
        return low

    def dimension(self, size: int) -> int:
        """Of the subspace that a slot of `size` numbers is projected onto; each bin but the zeroth and last is two."""
        kept = self._kept_bins(size)
        return size if kept == size // 2 + 1 else 2 * kept - 1

    def _kept_bins(self, size: int) -> int:
        return math.ceil(self.share * (size // 2 + 1))

    def of_slots(self, flat: Tensor, slot_sizes: Sequence[int]) -> Tensor:
        """`flat` [P] with each of its slots projected."""
        return torch.cat([self(part) for part in flat.split(list(slot_sizes))])
