"""The sockets of a daemon under couriers that are slow, many, gone or no couriers; and how it begins and ends."""

from __future__ import annotations

import grp
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.errors import ConfigError
from fedlora.privacy.ledger import Ledger
from fedlora.site import daemon as daemon_module
from fedlora.site import listeners
from fedlora.site.connection import DaemonAddress
from fedlora.site.daemon import LONGEST_SOCKET_PATH, Daemon
from fedlora.site.desk import Desk
from fedlora.site.listeners import MOST_CONNECTIONS
from fedlora.site.protocol import LARGEST_PAYLOAD, MAGIC, Answer, Request
from tests.site.conftest import Asking, SiteFolder, update_in

LONG = 30.0
"""Seconds after which something that has to end has not."""


@contextmanager
def serving(folder: SiteFolder) -> Iterator[Desk]:
    """A daemon in this process. It has to end although every other one may be patient."""
    desk = Desk(folder.settings)
    daemon = Daemon(desk)
    thread = threading.Thread(target=daemon.serve)
    thread.start()
    try:
        yield desk
    finally:
        daemon.stop()
        thread.join(LONG)
        ended = not thread.is_alive()
        desk.close()
    assert ended, "the daemon does not end"


@pytest.fixture
def desk(site_folder: SiteFolder) -> Iterator[Desk]:
    with serving(site_folder) as opened:
        yield opened


def ask(folder: SiteFolder, request: Request) -> Answer:
    return DaemonAddress(place=str(folder.socket)).ask(request, limit=60.0)


def called(folder: SiteFolder) -> socket.socket:
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(LONG)
    while True:
        try:
            line.connect(str(folder.socket))
        except BlockingIOError:  # more call than the system lets wait
            continue
        return line


def answered(line: socket.socket) -> Answer:
    with line.makefile("rb") as stream:
        return Answer.read(stream)


def hung_up(line: socket.socket) -> bool:
    """Whether the other side hangs up, once it has."""
    try:
        return line.recv(1) == b""
    except ConnectionError:
        return True


def reserved(folder: SiteFolder) -> int:
    ledger = Ledger.read(folder.path / "ledger.sqlite")
    rows = sum(entry.kind == "reserved" for entry in ledger.entries())
    ledger.close()
    return rows


def announcing(payload: int) -> bytes:
    header = b'{"ask": "enrol", "client": 0, "config": {}}'
    return MAGIC + len(header).to_bytes(4, "big") + payload.to_bytes(8, "big") + header


STATUS = Request(ask="status")


# Who is no courier -------------------------------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.booleans(), st.booleans())
def test_no_bytes_bring_it_down(
    desk: Desk, site_folder: SiteFolder, data: bytes, as_message: bool, waits: bool
) -> None:
    with called(site_folder) as line:
        line.sendall((MAGIC if as_message else b"") + data)
        line.shutdown(socket.SHUT_WR)
        if waits:
            with suppress(ConnectionError):  # of a message that is cut off there is nothing to say
                assert answered(line).code in ("protocol", "bad_input", "refused")
    assert ask(site_folder, STATUS).code == "ok"


def test_a_stranger_is_told_that_it_is_none(desk: Desk, site_folder: SiteFolder) -> None:
    with called(site_folder) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: site\r\n\r\n")
        assert answered(line).code == "protocol"


def test_lengths_beyond_their_bounds_are_refused_at_once(desk: Desk, site_folder: SiteFolder) -> None:
    with called(site_folder) as line:
        line.sendall(announcing(LARGEST_PAYLOAD + 1))
        assert answered(line).code == "protocol"


# Who is slow, gone or many -----------------------------------------------------------------------------------------


def test_who_sends_slowly_is_cut_off_though_something_comes_all_the_time(
    site_folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "PATIENCE", 0.5)
    with serving(site_folder), called(site_folder) as line:
        stopped = threading.Event()

        def drip() -> None:
            for byte in announcing(10_000_000) + bytes(1000):
                if stopped.wait(0.05):
                    return
                try:
                    line.sendall(bytes([byte]))
                except OSError:
                    return
            raise AssertionError("a request may take as long as its sender likes")

        dripping = threading.Thread(target=drip)
        dripping.start()
        gone = hung_up(line)
        stopped.set()
        dripping.join()
        assert gone


@pytest.mark.parametrize("sent", [0, 10, 200])
def test_it_ends_though_somebody_has_not_finished_asking(site_folder: SiteFolder, sent: int) -> None:
    with ExitStack() as stack:
        with serving(site_folder):
            line = stack.enter_context(called(site_folder))
            line.sendall(announcing(LARGEST_PAYLOAD)[:sent])
            assert ask(site_folder, STATUS).code == "ok", "the other call was taken before this one"
        assert hung_up(line)


def test_an_answer_that_nobody_takes_is_kept(desk: Desk, asking: Asking, site_folder: SiteFolder) -> None:
    with called(site_folder) as line:
        line.sendall(asking.round().encode())
    first = ask(site_folder, asking.round())
    update_in(first)
    assert ask(site_folder, asking.round()) == first
    assert reserved(site_folder) == 1


def test_a_hundred_at_once_are_too_many_and_none_is_in_the_way_for_ever(desk: Desk, site_folder: SiteFolder) -> None:
    with ExitStack() as stack:
        lines = []
        for _ in range(100):
            line = stack.enter_context(called(site_folder))
            line.settimeout(0.0)
            lines.append(line)
        gone = []
        while len(gone) < 100 - MOST_CONNECTIONS:
            gone = [line for line in lines if _is_cut(line)]
        assert len(gone) == 100 - MOST_CONNECTIONS
    answer = None
    while answer is None:  # until the daemon has seen that they hung up
        with called(site_folder) as line:
            line.sendall(STATUS.encode())
            try:
                answer = answered(line)
            except ConnectionError:
                continue
    assert answer.code == "ok"


def _is_cut(line: socket.socket) -> bool:
    try:
        return line.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_what_all_send_together_has_a_bound(desk: Desk, site_folder: SiteFolder) -> None:
    """Thirty connections with the largest payload each would be 8 GiB."""
    assert MOST_CONNECTIONS * LARGEST_PAYLOAD > listeners.MOST_BYTES
    with ExitStack() as stack:
        for _ in range(listeners.MOST_BYTES // LARGEST_PAYLOAD):
            stack.enter_context(called(site_folder)).sendall(announcing(LARGEST_PAYLOAD) + b"x" * 1000)
        while _code_of_one_byte(site_folder) != "busy":
            pass  # the others' announcements have yet to arrive
    while _code_of_one_byte(site_folder) == "busy":
        pass  # that they hung up has yet to be seen
    assert ask(site_folder, STATUS).code == "ok"


def _code_of_one_byte(folder: SiteFolder) -> str:
    with called(folder) as line:
        line.sendall(announcing(1) + b"x")
        return answered(line).code


# How it begins -----------------------------------------------------------------------------------------------------


def test_a_ledger_has_one_daemon(desk: Desk, site_folder: SiteFolder) -> None:
    second = Desk(site_folder.settings)
    with pytest.raises(ConfigError, match="another daemon serves the ledger"):
        Daemon(second)
    second.close()
    assert ask(site_folder, STATUS).code == "ok", "the first one's socket is still there"


def test_the_claim_destroys_nothing(site_folder: SiteFolder, asking: Asking) -> None:
    site_folder.write_policy(('ledger = "ledger.sqlite"', 'ledger = "ledger.daemon"'))
    with serving(site_folder):
        update_in(ask(site_folder, asking.round()))
    ledger = Ledger.read(site_folder.path / "ledger.daemon")
    assert len(ledger.entries()) == 2
    ledger.close()


def test_the_claim_is_the_owners_alone(desk: Desk, site_folder: SiteFolder) -> None:
    """Whoever could read it could hold it, and keep the daemon from starting."""
    assert mode(site_folder.path / "ledger.daemon") == 0o600


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def refused(folder: SiteFolder, match: str) -> None:
    desk = Desk(folder.settings)
    try:
        with pytest.raises(ConfigError, match=match):
            Daemon(desk)
    finally:
        desk.close()


def with_site(folder: SiteFolder, line: str) -> None:
    folder.write_policy(('device = "cpu"', f'device = "cpu"\n{line}'))


def test_a_path_that_is_too_long_is_refused(site_folder: SiteFolder) -> None:
    with_site(site_folder, f'socket = "{"x" * LONGEST_SOCKET_PATH}"')
    refused(site_folder, "more than 107 bytes")


def test_a_file_in_the_sockets_place_is_left_alone(site_folder: SiteFolder) -> None:
    site_folder.socket.write_text("the only copy")
    refused(site_folder, "cannot be listened on: Address already in use; name another")
    assert site_folder.socket.read_text() == "the only copy"


def test_a_socket_of_a_daemon_that_was_killed_is_taken_over(site_folder: SiteFolder) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(site_folder.socket))
    with serving(site_folder):
        assert ask(site_folder, STATUS).code == "ok"
    assert not site_folder.socket.exists()


def test_a_group_that_does_not_exist_is_refused_and_nothing_is_left(site_folder: SiteFolder) -> None:
    with_site(site_folder, 'socket_group = "no-such-group"')
    refused(site_folder, "there is no such group")
    assert not site_folder.socket.exists()


def own_group() -> grp.struct_group:
    return grp.getgrgid(os.getegid())


def test_the_socket_is_for_its_user_or_for_the_group(site_folder: SiteFolder) -> None:
    with serving(site_folder):
        assert mode(site_folder.socket) == 0o600
    with_site(site_folder, f'socket_group = "{own_group().gr_name}"')
    with serving(site_folder):
        assert mode(site_folder.socket) == 0o660
        assert site_folder.socket.lstat().st_gid == own_group().gr_gid


def test_a_link_in_the_sockets_place_opens_nothing_to_the_group(
    site_folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A courier that may write to the socket's folder puts it there as soon as the socket is."""
    with_site(site_folder, f'socket_group = "{own_group().gr_name}"')
    target = site_folder.path / "ledger.sqlite"
    bound = daemon_module.LocalListener.server_bind

    def bind_and_replace(self: listeners.Listener) -> None:
        bound(self)
        site_folder.socket.rename(site_folder.path / "elsewhere.sock")
        site_folder.socket.symlink_to(target)

    monkeypatch.setattr(daemon_module.LocalListener, "server_bind", bind_and_replace)
    with serving(site_folder):
        assert mode(target) == 0o600


# How it ends -------------------------------------------------------------------------------------------------------


@pytest.fixture
def held_round(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, Callable[[], None]]:
    """Set when a round is at work, which then waits until the function is called."""
    begun, go, done = threading.Event(), threading.Event(), Desk._round

    def slow(self: Desk, request: Request) -> Answer:
        begun.set()
        assert go.wait(LONG)
        return done(self, request)

    monkeypatch.setattr(Desk, "_round", slow)
    return begun, go.set


def test_a_round_at_work_is_ended_and_given(
    asking: Asking, site_folder: SiteFolder, held_round: tuple[threading.Event, Callable[[], None]]
) -> None:
    begun, go = held_round
    found: list[Answer] = []
    with serving(site_folder):
        caller = threading.Thread(target=lambda: found.append(ask(site_folder, asking.round())))
        caller.start()
        assert begun.wait(LONG)
        threading.Timer(0.5, go).start()  # when it is being stopped
    caller.join()
    update_in(found[0])
    with serving(site_folder):
        assert ask(site_folder, asking.round()) == found[0]
    assert reserved(site_folder) == 1


# What it tells -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asker", "code"), [(0, "ok"), (os.geteuid(), "ok"), (61_234, "refused"), (None, "refused")])
def test_status_is_for_its_own_user_and_root(
    desk: Desk, site_folder: SiteFolder, monkeypatch: pytest.MonkeyPatch, asker: int | None, code: str
) -> None:
    """What other runs have spent is none of a courier's business."""
    monkeypatch.setattr(listeners.Listener, "peer", lambda self, line: asker)
    answer = ask(site_folder, STATUS)
    assert answer.code == code
    assert bool(answer.facts) == (code == "ok")
