"""What crosses between server and client, whatever the transport; and the checks both ends make on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.slots import AdapterLayout
from fedlora.errors import ProtocolError

Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RoundInstruction:
    """Server to client: do this round of this phase, starting from this global state."""

    run_id: str
    round_index: int
    phase: str
    layout_digest: str
    """Of what is to be sent back."""
    theta: Tensor
    """[P] float32, the global adapter."""
    head: tuple[Tensor, Tensor] | None = None
    """Weight [C, h] and bias [C] of a prototype head, once there is one."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.theta, *(self.head or ())))


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """Client to server: the noised slots as one flat vector, and public facts about the guarantee."""

    run_id: str
    round_index: int
    phase: str
    client: int
    layout_digest: str
    vector: Tensor
    facts: Facts


@dataclass(frozen=True)
class ClientFailure:
    """Client to server: no update. `code` is one of a fixed set and says nothing about records."""

    client: int
    code: str


FAILURE_CODES = ("bad_input", "refused", "protocol", "internal", "no_reply")


def check_update(update: ClientUpdate, instruction: RoundInstruction, layout: AdapterLayout) -> None:
    """The same gate on both sides: what leaves a site, and what a server averages.

    Raises:
        ProtocolError: another run, round, phase or layout, a wrong shape or dtype, or numbers that are not finite.
    """
    pairs = {
        "run": (update.run_id, instruction.run_id),
        "round": (update.round_index, instruction.round_index),
        "phase": (update.phase, instruction.phase),
        "layout digest": (update.layout_digest, layout.digest),
        "shape": (tuple(update.vector.shape), (layout.size,)),
        "dtype": (update.vector.dtype, torch.float32),
    }
    for what, (got, wanted) in pairs.items():
        if got != wanted:
            raise ProtocolError(f"update of client {update.client} has {what} {got}, wanted {wanted}; it is not used")
    if not torch.isfinite(update.vector).all():
        raise ProtocolError(f"update of client {update.client} has numbers that are not finite; it is not used")
