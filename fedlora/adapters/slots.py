"""AdapterLayout: named slots of one flat float32 vector, the only thing that trains, leaves a site or is averaged."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
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

    @cached_property
    def part(self) -> str:
        """Of a factor of an adapter "A", "B" or "R", of a tensor of the head "head", else the last word of its name."""
        return "head" if self.name.startswith("head:") else self.name.rpartition("/")[2]

    def positions(self, rank: int) -> Tensor:
        """Where in the flat vector its first `rank` ranks lie, int64, in row-major order; of a head, all of it."""
        own = torch.arange(self.offset, self.offset + self.size).view(self.shape)
        match self.part:
            case "A":
                own = own[:rank]
            case "B":
                own = own[:, :rank]
            case "R":
                own = own[:rank, :rank]
        return own.flatten()


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
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of the flat vector, in order."""
        return tuple(dict.fromkeys(slot.part for slot in self.slots))

    def span(self, part: str) -> slice:
        """Where `part`, which lies in one piece, stands in the flat vector."""
        own = [slot for slot in self.slots if slot.part == part]
        return slice(own[0].offset, own[-1].offset + own[-1].size)

    def only(self, parts: Container[str], rank: int | None = None) -> Self:
        """The layout of these parts alone, and of the first `rank` ranks of their factors; itself where that is all.

        `alpha` is that of the scale, which stays.
        """
        rank = self.rank if rank is None else rank
        if rank == self.rank and all(part in parts for part in self.parts):
            return self
        shapes = {}
        for slot in self.slots:
            if slot.part in parts:
                cut = {"A": (rank, *slot.shape[1:]), "B": (slot.shape[0], rank), "R": (rank, rank)}
                shapes[slot.name] = cut.get(slot.part, slot.shape)
        return self.build(shapes, method=self.method, rank=rank, alpha=self.scale * rank)

    def positions(self, parts: Container[str], rank: int | None = None) -> Tensor:
        """Where the numbers of `only(parts, rank)` stand in this layout's flat vector, int64."""
        cut = [slot.positions(self.rank if rank is None else rank) for slot in self.slots if slot.part in parts]
        return torch.cat(cut) if cut else torch.empty(0, dtype=torch.int64)

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
