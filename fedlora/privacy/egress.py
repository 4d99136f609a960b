"""The door out of a site: what may leave, why it may, and the check that nothing else does.

Two things leave: one vector of already noised slots in the agreed layout, and facts from the list below. Every fact is
a function of the run's public configuration and of public properties of the site; none is computed from records.
Whatever else is to leave (a metric on private data, a count) has to become a phase: noised, charged, planned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from fedlora.errors import ProtocolError

MAX_TEXT = 128
MAX_PHASES = 16


@dataclass(frozen=True)
class Fact:
    """One entry of the allow-list: its type, and why it may leave."""

    kind: type
    why: str
    optional: bool = False


_CONFIGURED = "from the run's configuration"
_PLANNED = "from the public configuration and the public size"
_SPENT = "planned and scheduled in public; the same whatever the records are"

PHASE_FACTS: dict[str, Fact] = {
    "name": Fact(str, _CONFIGURED),
    "mechanism": Fact(str, _CONFIGURED),
    "sampling_probability": Fact(float, _PLANNED),
    "effective_noise_multiplier": Fact(float, _PLANNED),
    "sensitivity": Fact(float, _CONFIGURED),
    "num_steps": Fact(int, _SPENT),
}
FACTS: dict[str, Fact] = {
    "client": Fact(int, "assigned by the federation"),
    "num_examples": Fact(int, "where the site's policy, or a simulation, calls it public", optional=True),
    "noise_seeded": Fact(bool, _CONFIGURED),
    "unit": Fact(str, _CONFIGURED),
    "relation": Fact(str, _CONFIGURED),
    "delta": Fact(float, _CONFIGURED),
    "epsilon": Fact(float, _SPENT),
    "accountant": Fact(str, _CONFIGURED),
    "sampling_probability": Fact(float, _PLANNED),
    "noise_multiplier": Fact(float, _PLANNED),
    "effective_noise_multiplier": Fact(float, _PLANNED),
    "num_steps": Fact(int, _SPENT),
    "mechanism": Fact(str, _CONFIGURED),
    "clip_norm": Fact(float, _CONFIGURED),
    "clipping": Fact(str, _CONFIGURED),
    "phases": Fact(list, "the same, phase by phase"),
}


def check_vector(vector: Tensor, size: int, whose: str) -> None:
    """Refuse anything but `size` finite numbers of float32 in one row.

    Raises:
        ProtocolError: naming what is wrong with the vector of `whose`, and no number in it.
    """
    if tuple(vector.shape) != (size,):
        raise ProtocolError(f"update of {whose} has shape {tuple(vector.shape)}, wanted ({size},); it is not used")
    if vector.dtype != torch.float32:
        raise ProtocolError(f"update of {whose} has dtype {vector.dtype}, wanted torch.float32; it is not used")
    if not torch.isfinite(vector).all():
        raise ProtocolError(f"update of {whose} has numbers that are not finite; it is not used")


def check_facts(facts: Any) -> None:
    """Refuse facts that are not exactly those of the allow-list, each of its type and in its range.

    Raises:
        ProtocolError: naming the fact, never its value.
    """
    check_fields(facts, FACTS)
    if len(facts["phases"]) > MAX_PHASES:
        _refuse(f"{len(facts['phases'])} phases, wanted at most {MAX_PHASES}")
    for phase in facts["phases"]:
        check_fields(phase, PHASE_FACTS)


def check_fields(fields: Any, wanted: Mapping[str, Fact]) -> None:
    """Exactly the keys of `wanted`, each of its type: short printable text, finite numbers >= 0 (ε may be infinite)."""
    required = {key for key, fact in wanted.items() if not fact.optional}
    if not isinstance(fields, dict) or not required <= fields.keys() <= wanted.keys():
        _refuse(f"other fields than {', '.join(wanted)}")
    for key, value in fields.items():
        kind = wanted[key].kind
        whole = type(value) is int and 0 <= value < 2**63
        number = type(value) is float and value >= 0 and (math.isfinite(value) or key == "epsilon")
        usable = {
            int: whole,
            float: whole or number,
            bool: type(value) is bool,
            str: type(value) is str and len(value) <= MAX_TEXT and value.isprintable(),
            list: type(value) is list,
        }
        if not usable[kind]:
            _refuse(f"a value of {key} that is no {kind.__name__} in its range")


def _refuse(what: str) -> NoReturn:
    raise ProtocolError(f"a message has {what}; it is not used")
