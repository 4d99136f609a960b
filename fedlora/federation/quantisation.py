"""A client's move in fewer bits: `federation.wire_dtype`.

What is coded is the move, the noised vector less the theta that the client was sent: moves are small beside theta, and
what both sides know needs no bits. Each coordinate is rounded to one of its two neighbours on a grid, up with just the
chance that makes the mean right (stochastic rounding), independent of all others. Codes are functions of a noised
vector, of public numbers and of fresh coins alone: post-processing, which costs no privacy. That takes all of the
noise to be in the vector already, or the receiver to bound and noise what it decodes: parts that are enough noise only
in their sum must not be coded.

With x a coordinate of the move, s the grid's step at x and f in [0, 1) how far x lies above its lower neighbour, in
steps, the error has mean 0, expected square s² f (1 - f) <= s² / 4, and is always below s. Here

    int8      s = max|move| / 127 over the slot, rounded up to a float32: one scale per slot goes along
    bfloat16  s = 2^(e - 8) for |x| in [2^(e - 1), 2^e), so at most |x| / 128; down to 2^-133, where its numbers end

Only training is coded. Class sums, alignment scores and counts stay float32: what is estimated of them reckons with the
known variance of their noise alone. They are sent once in a run, or hardly more often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.slots import AdapterLayout, Slot
from fedlora.config import RunConfig
from fedlora.errors import ProtocolError
from fedlora.privacy.phases import TRAINING

WireDtype = Literal["float32", "bfloat16", "int8"]
DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
_MOST = 127
"""Largest code; -128 is left out, so that codes are symmetric."""
_BITS, _LEAST_EXPONENT = 8, -125
"""Of bfloat16: digits of a number, and the exponent e of its least one with so many."""


@dataclass(frozen=True)
class Coded:
    """A move as it travels."""

    codes: Tensor
    """[P] int8 or bfloat16."""
    scales: Tensor | None = None
    """[slots] float32, for int8: what a code of 1 means in each slot."""

    @property
    def num_bytes(self) -> int:
        return int(self.codes.nbytes) + (0 if self.scales is None else int(self.scales.nbytes))


def wire_dtype(config: RunConfig, phase: str) -> WireDtype:
    """In which updates of `phase` travel."""
    return config.federation.wire_dtype if phase in TRAINING else "float32"


def slot_bytes(slot: Slot, dtype: WireDtype) -> int:
    """What a slot takes of an update."""
    return {"float32": 4 * slot.size, "bfloat16": 2 * slot.size, "int8": slot.size + 4}[dtype]


def encode(move: Tensor, layout: AdapterLayout, dtype: WireDtype, generator: np.random.Generator) -> Coded:
    """Round `move` by chance.

    Args:
        move: [P], finite.
        layout: whose slots it has.
        dtype: bfloat16 or int8.
        generator: a secret stream of the client's own; P numbers are drawn, whatever the move is.
    """
    exact = move.detach().to("cpu", torch.float64).numpy()
    if dtype == "int8":
        scales = np.array([_scale(layout.view(move, slot)) for slot in layout.slots], np.float32)
        steps = np.repeat(scales.astype(np.float64), [slot.size for slot in layout.slots])
        return Coded(torch.from_numpy(_round(exact, steps, generator)).to(torch.int8), torch.from_numpy(scales))
    exponents = np.maximum(np.frexp(exact)[1], _LEAST_EXPONENT)
    steps = np.ldexp(1.0, exponents - _BITS)
    return Coded(torch.from_numpy(_round(exact, steps, generator) * steps).to(torch.bfloat16))


def decode(coded: Coded, layout: AdapterLayout, dtype: WireDtype) -> Tensor:
    """The move [P] that `coded` stands for, float64 and without any rounding.

    Raises:
        ProtocolError: `encode` cannot have made it of a move in this layout; naming no number in it.
    """
    wanted = DTYPES.get(dtype)
    codes, scales = coded.codes, coded.scales
    if codes.dtype != wanted or codes.shape != (layout.size,):
        _refuse(f"codes of {codes.dtype} and shape {tuple(codes.shape)}, wanted {layout.size} of {dtype}")
    if scales is None or dtype != "int8":
        if scales is not None or dtype == "int8" or not codes.isfinite().all():
            _refuse("codes that are not finite, or scales where none belong, or none where some do")
        return codes.double()
    if scales.dtype != torch.float32 or scales.shape != (len(layout.slots),):
        _refuse(f"scales of {scales.dtype} and shape {tuple(scales.shape)}, wanted {len(layout.slots)} of float32")
    if not (scales.isfinite() & (scales >= 0)).all() or codes.min() < -_MOST:
        _refuse(f"scales that are not finite and >= 0, or codes below -{_MOST}")
    sizes = torch.tensor([slot.size for slot in layout.slots])
    return codes.double() * scales.double().repeat_interleave(sizes)


def _scale(part: Tensor) -> np.float32:
    """Least float32 of which `_MOST` reach the largest number in `part`: none is cut off, so that the mean is right."""
    largest = float(part.abs().max())
    scale = np.float32(largest / _MOST)
    return scale if float(scale) * _MOST >= largest else np.nextafter(scale, np.float32(np.inf))


def _round(exact: np.ndarray, steps: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """`exact` in steps, rounded to whole ones by chance; 0 where the step is 0."""
    counted = np.divide(exact, steps, out=np.zeros_like(exact), where=steps > 0)
    lower = np.floor(counted)
    return np.asarray(lower + (generator.random(len(exact)) < counted - lower))


def _refuse(what: str) -> None:
    raise ProtocolError(f"an update has {what}; it is not used")
