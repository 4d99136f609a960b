"""Instructions and updates as bytes, for every transport that crosses a process border.

A message is one safetensors blob: its vectors as tensors, float32 but for coded moves, everything else as JSON in the
metadata. Such a blob can hold no program, and what arrives is believed only after names, dtypes, shapes, sizes and
facts were checked against an allow-list. The sender makes the same checks, so that nothing leaves a site by oversight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedlora.errors import ProtocolError
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.federation.quantisation import Coded
from fedlora.privacy.egress import Fact, check_facts, check_fields

FORMAT = "fedlora-wire-1"
MAX_HEADER_BYTES = 64 * 1024

# Beside the facts of `privacy.egress`; of a tensor, the dtype and the number of dimensions.
_TEXT, _NUMBER = Fact(str, "names the round"), Fact(int, "names the round")
_ENVELOPE = {"run_id": _TEXT, "round_index": _NUMBER, "phase": _TEXT, "layout_digest": _TEXT}
_ROW, _MATRIX = (torch.float32, 1), (torch.float32, 2)
_PARTS = {"head": {"weight": _MATRIX, "bias": _ROW}, "mask": {"mask": _ROW}, "folded": {"folded": _ROW}}
"""What an instruction may hold beside theta; its kind names them in this order."""
_CHOICES = [names for count in range(len(_PARTS) + 1) for names in combinations(_PARTS, count)]
_INSTRUCTIONS = {
    "+".join(("instruction", *names)): {"theta": _ROW}
    | {key: _PARTS[name][key] for name in names for key in _PARTS[name]}
    for names in _CHOICES
}
_UPDATES = {
    "update": {"vector": _ROW},
    "update+bfloat16": {"codes": (torch.bfloat16, 1)},
    "update+int8": {"codes": (torch.int8, 1), "scales": _ROW},
}
_VECTORS = {**_INSTRUCTIONS, **_UPDATES}


def encode_instruction(instruction: RoundInstruction) -> bytes:
    fields = {key: getattr(instruction, key) for key in _ENVELOPE}
    parts: dict[str, tuple[Tensor, ...]] = {}
    if instruction.head is not None:
        parts["head"] = instruction.head
    if instruction.mask is not None:
        parts["mask"] = (torch.tensor(instruction.mask, dtype=torch.float32),)
    if instruction.folded is not None:
        parts["folded"] = (instruction.folded,)
    tensors = {"theta": instruction.theta}
    for name, part in parts.items():
        tensors |= dict(zip(_PARTS[name], part, strict=True))
    return _encode("+".join(("instruction", *parts)), tensors, fields)


def decode_instruction(data: bytes) -> RoundInstruction:
    """What `encode_instruction` made.

    Raises:
        ProtocolError: `data` is anything else.
    """
    _, tensors, fields = _decode(data, tuple(_INSTRUCTIONS))
    check_fields(fields, _ENVELOPE)
    head = mask = None
    if "weight" in tensors:
        head = (tensors["weight"], tensors["bias"])
        if len(head[0]) != len(head[1]):
            _refuse(f"a head with {len(head[0])} rows and {len(head[1])} biases")
    if "mask" in tensors:
        bits = tensors["mask"].tolist()
        if not set(bits) <= {0.0, 1.0}:
            _refuse("a mask of other numbers than 0 and 1")
        mask = tuple(bit == 1.0 for bit in bits)
    return RoundInstruction(theta=tensors["theta"], head=head, mask=mask, folded=tensors.get("folded"), **fields)


def encode_update(update: ClientUpdate) -> bytes:
    """The update as bytes.

    Raises:
        ProtocolError: it holds a fact that is not on the list of those that may leave a site.
    """
    fields = {key: getattr(update, key) for key in _ENVELOPE}
    check_facts(update.facts)
    # JSON has no infinity, and ε = ∞ must not arrive as null.
    spelled = {"epsilon": "inf"} if math.isinf(update.facts["epsilon"]) else {}
    facts = {**update.facts, **spelled}
    kind, tensors = "update", {"vector": update.vector}
    if (coded := update.coded) is not None:
        kind, tensors = "update+bfloat16", {"codes": coded.codes}
        if coded.scales is not None:
            kind, tensors = "update+int8", tensors | {"scales": coded.scales}
    return _encode(kind, tensors, fields | {"client": update.client, "facts": facts})


def decode_update(data: bytes) -> ClientUpdate:
    """What `encode_update` made; of a coded one the vector is empty until `messages.opened_update` fills it in.

    Raises:
        ProtocolError: `data` is anything else.
    """
    _, tensors, fields = _decode(data, tuple(_UPDATES))
    facts = fields.pop("facts", None)
    if not isinstance(facts, dict):
        _refuse("an update without facts")
    facts["epsilon"] = math.inf if facts.get("epsilon") == "inf" else facts.get("epsilon")
    check_facts(facts)
    check_fields(fields, _ENVELOPE | {"client": _NUMBER})
    if facts["client"] != fields["client"]:
        _refuse(f"facts of client {facts['client']} in an update of client {fields['client']}")
    coded = Coded(tensors["codes"], tensors.get("scales")) if "codes" in tensors else None
    vector = torch.empty(0) if coded is not None else tensors["vector"]
    return ClientUpdate(vector=vector, coded=coded, facts=facts, **fields)


def _encode(kind: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> bytes:
    vectors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    _check_vectors(kind, vectors)
    metadata = {"format": FORMAT, "kind": kind, "fields": json.dumps(fields, allow_nan=False)}
    return bytes(save(vectors, metadata=metadata))


def _decode(data: bytes, kinds: tuple[str, ...]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Kind, vectors and fields of a blob of one of `kinds`; the caller checks the fields."""
    length = int.from_bytes(data[:8], "little") if isinstance(data, bytes) else -1
    if not 0 < length <= MAX_HEADER_BYTES:
        _refuse(f"a header of {length} bytes, wanted at most {MAX_HEADER_BYTES}")
    try:
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        kind, fields = metadata.get("kind"), json.loads(metadata.get("fields", "null"), parse_constant=_refuse)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise ProtocolError("a message that is no safetensors blob with JSON fields; it is not used") from error
    if metadata.get("format") != FORMAT or kind not in kinds or not isinstance(fields, dict):
        _refuse(f"another format or kind, wanted {FORMAT} {' or '.join(kinds)}; do both sides run the same fedlora?")
    _check_vectors(kind, tensors)
    return kind, tensors, fields


def _check_vectors(kind: str, tensors: Mapping[str, Tensor]) -> None:
    wanted = _VECTORS[kind]
    if tensors.keys() != wanted.keys():
        _refuse(f"{len(tensors)} tensors, wanted {', '.join(wanted)}")
    for name, tensor in tensors.items():
        dtype, dimensions = wanted[name]
        shaped = tensor.dtype == dtype and tensor.dim() == dimensions and tensor.numel() > 0
        if not shaped or not torch.isfinite(tensor).all():
            spelled = str(dtype).removeprefix("torch.")
            _refuse(f"a {name} that is not {dimensions}-dimensional, {spelled}, finite and of at least one number")


def _refuse(what: str) -> NoReturn:
    raise ProtocolError(f"a message has {what}; it is not used")
