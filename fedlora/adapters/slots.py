"""AdapterLayout: named slots of one flat float32 vector, the only thing that trains, leaves a site or is averaged."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from torch import Tensor

from fedlora.errors import AdapterError


@dataclass(frozen=True)
class Slot:
    """A named tensor inside the flat vector, at `offset`, in row-major order."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class AdapterLayout:
    """Order, names and shapes of all trained slots; both sides of every message compare its digest."""

    slots: tuple[Slot, ...]
    method: str
    rank: int
    alpha: float

    @classmethod
    def build(cls, shapes: Mapping[str, tuple[int, ...]], *, method: str, rank: int, alpha: float) -> Self:
        """Lay `shapes` out one after another, in the mapping's order."""
        slots, offset = [], 0
        for name, shape in shapes.items():
            slots.append(Slot(name, tuple(shape), offset))
            offset += slots[-1].size
        return cls(tuple(slots), method, rank, alpha)

    @cached_property
    def size(self) -> int:
        """P, the length of the flat vector."""
        return sum(slot.size for slot in self.slots)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @cached_property
    def digest(self) -> str:
        """SHA-256 over method, rank, alpha and every slot's name, shape and offset."""
        facts = [self.method, self.rank, self.alpha, [[slot.name, slot.shape, slot.offset] for slot in self.slots]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def view(self, flat: Tensor, slot: Slot) -> Tensor:
        """The slot's part of `flat` [..., P], shaped [..., *slot.shape], sharing memory.

        Raises:
            AdapterError: `flat` does not end in P.
        """
        if flat.shape[-1] != self.size:
            raise AdapterError(f"flat vector has {flat.shape[-1]} numbers, this layout wants {self.size}")
        part: Tensor = flat[..., slot.offset : slot.offset + slot.size].unflatten(-1, slot.shape)
        return part
