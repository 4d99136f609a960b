"""What a server adds to the frozen base between rounds, on top of the base's own weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.adapters.methods.layout import Places
from fedlora.errors import AdapterError


class FoldedBase:
    """The weights of adapted modules: their own, plus what was learnt in earlier rounds.

    The sum is made anew from the original weights each time, so that nothing drifts.
    """

    def __init__(self, modules: Mapping[str, nn.Linear], places: Places) -> None:
        """Nothing is added yet.

        Args:
            modules: linears by path, as they are under the adapters.
            places: base name of an adapter -> paths of its modules, which are all given the same.
        """
        self._adapted = [[modules[path] for path in paths] for paths in places.values()]
        self._originals: list[list[Tensor]] = []
        self.added: Tensor | None = None
        """[F] by now."""

    @property
    def size(self) -> int:
        """F: numbers in what is added, [d_out, d_in] of each adapter, one after the other."""
        return sum(linears[0].weight.numel() for linears in self._adapted)

    @torch.no_grad()
    def add(self, folded: Tensor | None) -> None:
        """Make the weights the original ones plus `folded` [F] float32; plus nothing for None.

        Raises:
            AdapterError: it is of another size.
        """
        if folded is None:
            self.undo()
            return
        if folded.shape != (self.size,):
            raise AdapterError(
                f"{tuple(folded.shape)} numbers to add to the base, but the adapted modules have {self.size}; both "
                "sides must have the same adapters"
            )
        if not self._originals:
            self._originals = [[linear.weight.clone() for linear in linears] for linears in self._adapted]
        parts = folded.split([linears[0].weight.numel() for linears in self._adapted])
        self.added = folded
        for linears, originals, part in zip(self._adapted, self._originals, parts, strict=True):
            for linear, original in zip(linears, originals, strict=True):
                linear.weight.copy_(original + part.to(original).view_as(original))

    @torch.no_grad()
    def undo(self) -> None:
        """Put the original weights back."""
        for linears, originals in zip(self._adapted, self._originals, strict=bool(self._originals)):
            for linear, original in zip(linears, originals, strict=True):
                linear.weight.copy_(original)
        self._originals, self.added = [], None
