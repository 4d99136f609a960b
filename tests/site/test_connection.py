"""A courier's call: what it makes of a daemon that is not there, goes away or is none."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlora.errors import DaemonUnreachable, ProtocolError
from fedlora.site import connection
from fedlora.site.connection import DaemonAddress
from fedlora.site.protocol import LARGEST_PAYLOAD, MAGIC, Answer, Request

QUESTION = Request(ask="enrol", config={"run.seed": 1})


@pytest.fixture
def place() -> Iterator[Path]:
    """In /tmp itself: the path of a socket has to be short."""
    folder = Path(tempfile.mkdtemp(prefix="fedlora-line-", dir="/tmp"))
    yield folder / "site.sock"
    shutil.rmtree(folder)


@contextmanager
def listening(place: Path, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """Something at `place` that takes one call and does `answer` to it."""
    with socket.socket(socket.AF_UNIX) as line:
        line.bind(str(place))
        line.listen()

        def take() -> None:
            with line.accept()[0] as call:
                answer(call)

        thread = threading.Thread(target=take)
        thread.start()
        yield
        thread.join()


def whole_request(call: socket.socket) -> Request:
    with call.makefile("rb") as stream:
        return Request.read(stream)


def ask(place: Path, *, limit: float = 30.0, patience: float = 30.0) -> Answer:
    return DaemonAddress(place=str(place)).ask(QUESTION, limit=limit, patience=patience)


def test_an_answer_arrives_as_it_was_given(place: Path) -> None:
    given = Answer(code="ok", facts={"client": 3}, update=b"x" * 3_000_000)
    heard = []

    def answer(call: socket.socket) -> None:
        heard.append(whole_request(call))
        call.sendall(given.encode())

    with listening(place, answer):
        assert ask(place) == given
    assert heard == [QUESTION]


def test_nobody_there_is_said_so(place: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="is `fedlora site serve` running"):
        ask(place, patience=0.0)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))
    with pytest.raises(DaemonUnreachable, match="Connection refused"):
        ask(place, patience=0.0)


def test_a_daemon_that_is_starting_is_waited_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    monkeypatch.setattr(connection.time, "sleep", lambda _: (begun.set(), threading.Event().wait(0.01)))
    found: list[Answer] = []
    caller = threading.Thread(target=lambda: found.append(ask(place)))
    caller.start()
    assert begun.wait(30)

    def answer(call: socket.socket) -> None:
        whole_request(call)
        call.sendall(Answer().encode())

    with listening(place, answer):
        caller.join()
    assert found == [Answer()]


def hang_up_at_once(call: socket.socket) -> None:
    pass


def hang_up_before_the_answer(call: socket.socket) -> None:
    whole_request(call)


def hang_up_within_the_answer(call: socket.socket) -> None:
    whole_request(call)
    call.sendall(Answer(update=b"x" * 100).encode()[:-1])


def keep_silent(call: socket.socket) -> None:
    whole_request(call)
    assert call.recv(1) == b"", "until the courier gives up"


@pytest.mark.parametrize("broken", [hang_up_at_once, hang_up_before_the_answer, hang_up_within_the_answer, keep_silent])
def test_a_line_that_breaks_may_be_tried_again(place: Path, broken: Callable[[socket.socket], None]) -> None:
    """A daemon killed in the middle of a round is no breach of protocol: its site is to be asked again."""
    with listening(place, broken), pytest.raises(DaemonUnreachable):
        ask(place, limit=0.5)


STRANGERS = {
    "of another version": MAGIC.replace(b"1", b"2") + Answer().encode()[len(MAGIC) :],
    "HTTP": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "without bounds": MAGIC + (2).to_bytes(4, "big") + (LARGEST_PAYLOAD + 1).to_bytes(8, "big") + b"{}",
    "without a code": MAGIC + (2).to_bytes(4, "big") + bytes(8) + b"{}",
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_what_answers_and_is_no_daemon_is_told_apart(place: Path, kind: str) -> None:
    def answer(call: socket.socket) -> None:
        whole_request(call)
        call.sendall(STRANGERS[kind])

    with listening(place, answer), pytest.raises(ProtocolError):
        ask(place)


def test_patience_has_an_end(place: Path) -> None:
    with pytest.raises(DaemonUnreachable):
        ask(place, patience=time.get_clock_info("monotonic").resolution)


def test_a_daemon_that_is_overrun_is_waited_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system lets a few calls wait and turns others away at once."""
    turned_away, found = threading.Event(), []
    with socket.socket(socket.AF_UNIX) as line, socket.socket(socket.AF_UNIX) as waiting:
        line.bind(str(place))
        line.listen(0)
        waiting.connect(str(place))

        def take_who_waits(_: float) -> None:
            line.accept()[0].close()
            turned_away.set()

        monkeypatch.setattr(connection.time, "sleep", take_who_waits)
        caller = threading.Thread(target=lambda: found.append(ask(place)))
        caller.start()
        assert turned_away.wait(30)
        with line.accept()[0] as call:
            whole_request(call)
            call.sendall(Answer().encode())
        caller.join()
    assert found == [Answer()]
