"""Whatever arrives is a message or is refused, and no announced length is believed before its bytes are there."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import ProtocolError
from fedlora.site.protocol import LARGEST_HEADER, LARGEST_PAYLOAD, MAGIC, Answer, Request

NOT_USED = (ProtocolError, ConnectionAbortedError)
"""How a message ends that is none, or does not arrive as a whole."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def frame(header: bytes, payload: bytes = b"") -> bytes:
    return MAGIC + len(header).to_bytes(4, "big") + len(payload).to_bytes(8, "big") + header + payload


class Announcing(io.BytesIO):
    """A stream that knows the most that was asked of it at once."""

    most = 0

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        self.most = max(self.most, size)
        return super().read(size)


@given(
    st.sampled_from(("enrol", "round", "status")),
    st.integers(0, 10**9),
    st.dictionaries(st.text(), st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), max_size=5),
    st.binary(max_size=100),
)
def test_a_request_arrives_as_it_was_sent(ask: Any, client: int, config: dict[str, Any], instruction: bytes) -> None:
    request = Request(ask=ask, client=client, config=config, instruction=instruction)
    assert Request.read(io.BytesIO(request.encode())) == request


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    for kind in (Request, Answer):
        with pytest.raises(NOT_USED):
            kind.read(io.BytesIO(data))
        with pytest.raises(NOT_USED):
            kind.read(io.BytesIO(MAGIC + data))


@given(st.dictionaries(st.sampled_from(("ask", "client", "config", "code", "facts", "x")), json_values))
def test_any_header_is_a_request_or_refused(header: dict[str, Any]) -> None:
    try:
        request = Request.read(io.BytesIO(frame(json.dumps(header).encode())))
    except ProtocolError:
        return
    assert type(request.client) is int
    assert request.client >= 0
    assert all(type(value) in (bool, int, float, str) for value in request.config.values())


@given(st.data())
def test_a_message_that_is_cut_off_is_not_used(data: st.DataObject) -> None:
    whole = Request(ask="round", config={"run.seed": 1}, instruction=b"x" * 50).encode()
    with pytest.raises(ConnectionAbortedError):
        Request.read(io.BytesIO(whole[: data.draw(st.integers(0, len(whole) - 1))]))


@pytest.mark.parametrize("place", ["header", "payload"])
def test_a_length_beyond_its_bound_is_refused_before_anything_is_read(place: str) -> None:
    header, payload = (LARGEST_HEADER + 1, 0) if place == "header" else (2, LARGEST_PAYLOAD + 1)
    stream = Announcing(MAGIC + header.to_bytes(4, "big") + payload.to_bytes(8, "big") + b"{}" * 1000)
    with pytest.raises(ProtocolError, match="too large"):
        Request.read(stream)
    assert stream.tell() == len(MAGIC) + 12


def test_memory_is_taken_as_bytes_arrive() -> None:
    header = json.dumps({"ask": "enrol", "client": 0, "config": {}}).encode()
    announced = MAGIC + len(header).to_bytes(4, "big") + LARGEST_PAYLOAD.to_bytes(8, "big") + header + b"x" * 10
    stream = Announcing(announced)
    with pytest.raises(ConnectionAbortedError):
        Request.read(stream)
    assert stream.most <= 2**20


def test_who_takes_it_may_say_no_before_the_payload_is_read() -> None:
    sent = Request(ask="enrol", instruction=b"x" * 1000).encode()
    stream = io.BytesIO(sent)

    def full(size: int) -> None:
        assert size == 1000
        raise BlockingIOError

    with pytest.raises(BlockingIOError):
        Request.read(stream, full)
    assert stream.tell() == len(sent) - 1000


HOSTILE_HEADERS = {
    "nested": b"[" * 60_000,
    "a number of 60,000 digits": b'{"ask": "enrol", "client": ' + b"9" * 60_000 + b', "config": {}}',
    "no JSON": b"\xff\xfe",
    "a list": b"[]",
    "true for a number": b'{"ask": "enrol", "client": true, "config": {}}',
    "below zero": b'{"ask": "enrol", "client": -1, "config": {}}',
    "a table in a table": b'{"ask": "enrol", "client": 0, "config": {"a": {"b": 1}}}',
    "another question": b'{"ask": "records", "client": 0, "config": {}}',
}


@pytest.mark.parametrize("kind", HOSTILE_HEADERS)
def test_a_hostile_header_is_refused(kind: str) -> None:
    with pytest.raises(ProtocolError):
        Request.read(io.BytesIO(frame(HOSTILE_HEADERS[kind])))


def test_what_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProtocolError, match="wanted at most"):
        Request(ask="enrol", config={"model.name": "x" * LARGEST_HEADER}).encode()
    monkeypatch.setattr("fedlora.site.protocol.LARGEST_PAYLOAD", 10)
    with pytest.raises(ProtocolError, match="wanted at most"):
        Answer(update=b"x" * 11).encode()
