"""The wire: whole while it is whole, and silent, not refusing, while it is cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from deploy.network import Wire


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server that sends back what it gets."""

    def answer(line: socket.socket) -> None:
        with line:
            while data := line.recv(1000):
                line.sendall(data)

    def serve() -> None:
        while True:
            try:
                line, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(line,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.fixture
def wire(echo_port: int) -> Iterator[Wire]:
    wire = Wire(echo_port)
    yield wire
    wire.close()


def connect(wire: Wire, patience: float = 30.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", wire.port), timeout=patience)


def test_bytes_pass_both_ways_also_many(wire: Wire) -> None:
    sent = bytes(range(256)) * 4000
    with connect(wire) as line:
        sender = threading.Thread(target=line.sendall, args=(sent,))
        sender.start()
        got = _receive(line, len(sent))
        sender.join()
    assert got == sent


def test_a_cut_wire_is_silent_and_what_was_sent_arrives_once_it_is_mended(wire: Wire) -> None:
    with connect(wire) as old:
        old.sendall(b"before")
        assert _receive(old, 6) == b"before"
        wire.cut()
        old.sendall(b"during")
        old.settimeout(0.5)
        with pytest.raises(TimeoutError):
            old.recv(6)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                connect(wire, patience=0.5)
        wire.mend()
        old.settimeout(30.0)
        assert _receive(old, 6) == b"during"
        with connect(wire) as new:
            new.sendall(b"after")
            assert _receive(new, 5) == b"after"


def test_it_can_be_cut_again(wire: Wire) -> None:
    for _ in range(3):
        wire.cut()
        with pytest.raises(TimeoutError):
            connect(wire, patience=0.3)
        wire.mend()
        with connect(wire) as line:
            line.sendall(b"x")
            assert _receive(line, 1) == b"x"


def test_closing_ends_connections(echo_port: int) -> None:
    wire = Wire(echo_port)
    with connect(wire) as line:
        line.sendall(b"x")
        assert _receive(line, 1) == b"x"
        wire.close()
        assert line.recv(1) == b""


def _receive(line: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count and (data := line.recv(count - len(got))):
        got += data
    return got
