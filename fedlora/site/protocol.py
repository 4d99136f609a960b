r"""What a courier and a site's daemon say to each other: one request and one answer on a connection, then it is closed.

    frame    "fedlora-site 1\n", length of the header (4 bytes), length of the payload (8 bytes), header, payload
    header   a JSON object
    payload  bytes of `federation.wire`, which the receiver checks by itself

Integers are big-endian. Nothing here can hold code, and no length is believed beyond its bound. Standard library only:
a courier starts anew for every message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from fedlora.errors import ProtocolError

MAGIC = b"fedlora-site 1\n"
LARGEST_HEADER = 64 * 1024
LARGEST_PAYLOAD = 256 * 1024 * 1024
"""Bytes: four times what a base of 350 million parameters at rank 64 on all modules needs."""
_CHUNK = 1024 * 1024

Ask = Literal["enrol", "round", "status"]
ASKS: tuple[Ask, ...] = ("enrol", "round", "status")
Scalar = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class Request:
    """To the daemon."""

    ask: Ask
    client: int = 0
    """Which client of the run this site is said to be."""
    config: Mapping[str, Scalar] = field(default_factory=dict)
    """The run's configuration in Flower's flat notation."""
    instruction: bytes = field(default=b"", repr=False)
    """`wire.encode_instruction`, for a round."""

    def encode(self) -> bytes:
        return _encode({"ask": self.ask, "client": self.client, "config": dict(self.config)}, self.instruction)

    @classmethod
    def read(cls, stream: BinaryIO, make_room: Callable[[int], None] = lambda size: None) -> Request:
        """The request that the other side sends.

        Args:
            stream: that it arrives on.
            make_room: told how many bytes of payload are announced, before any is read; may raise.

        Raises:
            ProtocolError: it is none.
            OSError: it does not arrive, or not as a whole.
        """
        header, payload = _read(stream, make_room)
        ask, client, config = header.get("ask"), header.get("client"), header.get("config")
        if ask not in ASKS or type(client) is not int or client < 0 or not isinstance(config, dict):
            raise ProtocolError(f"a request without ask ({', '.join(ASKS)}), client or config; it is not answered")
        if not all(isinstance(value, Scalar) for value in config.values()):
            raise ProtocolError("a request whose configuration is not flat; it is not answered")
        return cls(ask=ask, client=client, config=config, instruction=payload)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """From the daemon."""

    code: str = "ok"
    """"ok", or one of `federation.failures.FAILURE_CODES`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Public ones, as JSON: for enrol and status."""
    update: bytes = field(default=b"", repr=False)
    """`wire.encode_update`, for a round."""

    def encode(self) -> bytes:
        return _encode({"code": self.code, "facts": dict(self.facts)}, self.update)

    @classmethod
    def read(cls, stream: BinaryIO) -> Answer:
        """The answer that the other side sends.

        Raises:
            ProtocolError: it is none.
            OSError: it does not arrive, or not as a whole.
        """
        header, payload = _read(stream, lambda size: None)
        code, facts = header.get("code"), header.get("facts")
        if not isinstance(code, str) or not isinstance(facts, dict):
            raise ProtocolError("an answer without code or facts; do courier and daemon run the same fedlora?")
        return cls(code=code, facts=facts, update=payload)


def _encode(header: Mapping[str, Any], payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    if len(text) > LARGEST_HEADER or len(payload) > LARGEST_PAYLOAD:
        raise ProtocolError(
            f"a message of {len(text)} and {len(payload)} bytes, wanted at most {LARGEST_HEADER} and {LARGEST_PAYLOAD}"
        )
    return MAGIC + len(text).to_bytes(4, "big") + len(payload).to_bytes(8, "big") + text + payload


def _read(stream: BinaryIO, make_room: Callable[[int], None]) -> tuple[dict[str, Any], bytes]:
    start = _exactly(stream, len(MAGIC) + 12)
    lengths = start[len(MAGIC) :]
    header_length, payload_length = int.from_bytes(lengths[:4], "big"), int.from_bytes(lengths[4:], "big")
    if not start.startswith(MAGIC):
        raise ProtocolError(f"a message that does not begin with {MAGIC.decode().strip()}; it is not used")
    if header_length > LARGEST_HEADER or payload_length > LARGEST_PAYLOAD:
        raise ProtocolError(f"a message of {header_length} and {payload_length} bytes is too large; it is not used")
    try:
        header = json.loads(_exactly(stream, header_length))
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a message whose header is no JSON; it is not used") from error
    if not isinstance(header, dict):
        raise ProtocolError("a message whose header is no JSON object; it is not used")
    make_room(payload_length)
    return header, _exactly(stream, payload_length)


def _exactly(stream: BinaryIO, length: int) -> bytes:
    """`length` bytes; memory is taken as they arrive, and not because somebody announces them."""
    parts: list[bytes] = []
    while length > 0:
        part = stream.read(min(length, _CHUNK))
        if not part:
            raise ConnectionAbortedError("the other side hung up in the middle of a message")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
