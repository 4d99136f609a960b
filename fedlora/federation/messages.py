"""What crosses between server and client, whatever the transport; and the checks both ends make on it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from fedlora.adapters.slots import AdapterLayout
from fedlora.errors import ProtocolError
from fedlora.federation.quantisation import Coded, WireDtype, decode, encode
from fedlora.privacy.egress import check_facts, check_vector

Facts = dict[str, Any]

LARGEST_VALUE = 10.0
"""Of theta. Records of one micro-batch share padding and kernels, so rounding ties them together a little; far outside
the range of trained values a hostile theta can magnify that beyond the clip norm. No site takes one, so no server makes
one of what it gets."""


@dataclass(frozen=True, kw_only=True)
class RoundInstruction:
    """Server to client: do this round of this phase, starting from this global state."""

    run_id: str
    round_index: int
    phase: str
    layout_digest: str
    """Of what is to be sent back."""
    theta: Tensor
    """[P] float32, the global adapter; followed by the gates' logits [M] where those are trained too."""
    head: tuple[Tensor, Tensor] | None = None
    """Weight [C, h] and bias [C] of a prototype head, once there is one."""
    mask: tuple[bool, ...] | None = None
    """Which candidates were chosen, once they are, where adapter.select chooses: one per candidate in model order."""
    folded: Tensor | None = None
    """[F] float32, where adapter.method folds products into the base: what the server has added to the adapted weights
    so far, one after another."""

    @property
    def num_bytes(self) -> int:
        """Of its numbers; a mask has a bit per candidate."""
        return sum(int(tensor.nbytes) for tensor in self._tensors) + -(-len(self.mask or ()) // 8)

    @property
    def digest(self) -> str:
        """SHA-256 over all of it, in hex; its bytes on the wire have no order of their own to rely on."""
        names = [self.run_id, self.round_index, self.phase, self.layout_digest, self.mask]
        shapes = [list(tensor.shape) for tensor in self._tensors]
        digest = hashlib.sha256(json.dumps([names, shapes]).encode())
        for tensor in self._tensors:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        """No two choices of parts make as many, so that `digest` can tell them apart by their shapes alone."""
        return (self.theta, *(self.head or ()), *(() if self.folded is None else (self.folded,)))


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """Client to server: the noised slots as one flat vector, and public facts about the guarantee."""

    run_id: str
    round_index: int
    phase: str
    client: int
    layout_digest: str
    vector: Tensor
    """[P] float32. Of a coded update that came over a wire: nothing, until `opened_update` knows what it moved from."""
    facts: Facts
    coded: Coded | None = None
    """Its move, where that travels in place of the vector."""

    @property
    def num_bytes(self) -> int:
        """Of its numbers, as they travel."""
        return int(self.vector.nbytes) if self.coded is None else self.coded.num_bytes


@dataclass(frozen=True)
class ClientFailure:
    """Client to server: no update. `code` is one of `FAILURE_CODES` and says nothing about records."""

    client: int
    code: str


def check_update(update: ClientUpdate, instruction: RoundInstruction, layout: AdapterLayout) -> None:
    """The same gate on both sides: what leaves a site, and what a server averages.

    Raises:
        ProtocolError: another run, round, phase or layout, a wrong shape or dtype, numbers that are not
            finite, or a fact that is not on the list of those that may leave.
    """
    pairs = {
        "run": (update.run_id, instruction.run_id),
        "round": (update.round_index, instruction.round_index),
        "phase": (update.phase, instruction.phase),
        "layout digest": (update.layout_digest, layout.digest),
    }
    for what, (got, wanted) in pairs.items():
        if got != wanted:
            raise ProtocolError(f"update of client {update.client} has {what} {got}, wanted {wanted}; it is not used")
    check_vector(update.vector, layout.size, f"client {update.client}")
    check_facts(update.facts)


def coded_update(
    update: ClientUpdate, start: Tensor, layout: AdapterLayout, dtype: WireDtype, generator: np.random.Generator
) -> ClientUpdate:
    """`update` as it leaves its site: with its move coded, and the vector that the server will find in that.

    Args:
        update: noised already.
        start: [P], what it moved from: the instruction's theta, as far as it is sent back.
        layout: of what is sent.
        dtype: bfloat16 or int8.
        generator: a secret stream of this client and round, used for nothing else.
    """
    coded = encode(update.vector.double() - start.double(), layout, dtype, generator)
    return opened_update(replace(update, coded=coded), start, layout, dtype)


def opened_update(update: ClientUpdate, start: Tensor, layout: AdapterLayout, dtype: WireDtype) -> ClientUpdate:
    """`update` with the vector that its codes stand for: the same bits whatever carried it. float32 is left alone.

    Args:
        update: as it left a site, or as it arrived.
        start: as in `coded_update`.
        layout: of what was to be sent.
        dtype: in which.

    Raises:
        ProtocolError: it is coded otherwise.
    """
    if update.coded is None and dtype == "float32":
        return update
    if update.coded is None or dtype == "float32":
        raise ProtocolError(f"update of client {update.client} is not in {dtype}, as wanted; it is not used")
    return replace(update, vector=(start.double() + decode(update.coded, layout, dtype)).float())
