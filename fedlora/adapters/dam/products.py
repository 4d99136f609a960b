"""What the noised updates of a warm-up say about each module: signal energy without the noise's share of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fedlora.adapters.dam.mask import Candidate
from fedlora.adapters.slots import AdapterLayout, Slot
from fedlora.errors import AdapterError


@dataclass(kw_only=True)
class UpdateProducts:
    """Running sums over the noised updates of several sites and rounds, from which products of pairs follow.

    Updates y of different sites or rounds carry independent noise, so <y, y'> has none on average. The mean over all
    pairs needs only Σy and Σ|y|², so no update is kept. Its expectation is the mean of <E y, E y'> over pairs, which is
    |E y|² where all updates have one mean. Within a round that is exact given where the round starts; a later round
    starts from a point that the earlier noise has moved, which couples the two by (step size × curvature), to first
    order.

    To go on from a saved state, put `count`, `total` and `squares` into `empty(...)` of the same layout by
    `dataclasses.replace`.
    """

    slots: tuple[Slot, ...]
    """One for each of M candidates; whatever else the layout holds, such as a trained head, belongs to none."""
    count: int
    """n, updates added."""
    total: Tensor
    """Their sum [P], float64."""
    squares: Tensor
    """Sum of |y_m|² over them, by module [M], float64."""

    def __post_init__(self) -> None:
        end = max((slot.offset + slot.size for slot in self.slots), default=0)
        if self.squares.shape != (len(self.slots),) or self.total.ndim != 1 or len(self.total) < end:
            raise AdapterError(
                f"sums of updates of shapes {tuple(self.total.shape)} and {tuple(self.squares.shape)}, wanted at least "
                f"{end} numbers and {len(self.slots)} modules; they belong to another layout"
            )

    @classmethod
    def empty(cls, layout: AdapterLayout, candidates: Sequence[Candidate]) -> Self:
        """Sums over no updates yet.

        Raises:
            AdapterError: `layout` lacks a candidate's slot `<module>/B` [out_features, rank].
        """
        named = {slot.name: slot for slot in layout.slots}
        slots = []
        for candidate in candidates:
            name, shape = f"{candidate.module}/B", (candidate.out_features, layout.rank)
            if name not in named or named[name].shape != shape:
                found = named[name].shape if name in named else "none"
                raise AdapterError(f"slot {name}: got {found}, wanted {shape}; the layout must adapt every candidate")
            slots.append(named[name])
        return cls(
            slots=tuple(slots),
            count=0,
            total=torch.zeros(layout.size, dtype=torch.float64),
            squares=torch.zeros(len(slots), dtype=torch.float64),
        )

    def add(self, delta: Tensor) -> None:
        """Count in one site's noised update `delta` [P] of one round.

        Raises:
            AdapterError: `delta` is not a vector [P].
        """
        if delta.shape != self.total.shape:
            raise AdapterError(f"an update of shape {tuple(delta.shape)}, wanted {tuple(self.total.shape)}")
        exact = delta.detach().cpu().double()
        self.count += 1
        self.total = self.total + exact
        self.squares = self.squares + self._energies(exact)

    def signal(self) -> Tensor:
        """Mean of <y_m, y'_m> over ordered pairs of different updates, by module [M]: (|Σy_m|² − Σ|y_m|²) / (n(n − 1)).

        Unbiased for |E y_m|², hence negative at times where there is little signal.

        Raises:
            AdapterError: fewer than two updates.
        """
        if self.count < 2:
            raise AdapterError(f"products of different updates need at least 2, got {self.count}; warm up for longer")
        return (self._energies(self.total) - self.squares) / (self.count * (self.count - 1))

    def deviation(self) -> Tensor:
        """Standard deviation of `signal` under whatever differs between updates, by module [M]; an estimate.

        For y = μ + z with d independent coordinates of variance s² in z, that of the mean over pairs is
        4 s² |μ|² / n + 2 d s⁴ / (n(n − 1)); |μ|² and d s² are put in as estimated, as 0 where they come out below.
        """
        signal = self.signal()
        noise = (self.squares / self.count - signal).clamp(min=0.0)
        sizes = torch.tensor([slot.size for slot in self.slots], dtype=torch.float64)
        pairs = self.count * (self.count - 1)
        return (4 * noise / sizes * signal.clamp(min=0.0) / self.count + 2 * noise**2 / (sizes * pairs)).sqrt()

    def noise_to_signal(self, clients: int) -> float:
        """R ≥ 0, all modules together: noise energy over signal energy in the mean of `clients` updates of one round.

        With S the summed `signal` and T the mean |y|², one update has the noise energy T − S and the mean of K sites
        the K-th part of it, by equal weights. Noise is whatever differs between updates: what privacy adds, but also
        the draw of batches and the sites' different records. ∞ where S <= 0: nothing shows through.

        Raises:
            AdapterError: fewer than two updates, or no client.
        """
        if clients < 1:
            raise AdapterError(f"the mean of {clients} updates, wanted at least 1 client")
        signal = float(self.signal().sum())
        mean_energy = float(self.squares.sum()) / self.count
        return max(mean_energy - signal, 0.0) / (clients * signal) if signal > 0 else math.inf

    def _energies(self, flat: Tensor) -> Tensor:
        """|.|² of each module's part of `flat` [P]: [M]."""
        parts = [flat[slot.offset : slot.offset + slot.size].square().sum() for slot in self.slots]
        return torch.stack(parts) if parts else self.squares.new_zeros(0)
