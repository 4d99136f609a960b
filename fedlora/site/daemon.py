"""The sockets in front of a site's desk: who may knock, how many at once, how long, and an end that loses nothing."""

from __future__ import annotations

import fcntl
import grp
import ipaddress
import logging
import os
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fedlora.errors import ConfigError, FedloraError
from fedlora.federation.failures import failure_code, log_failure
from fedlora.privacy.policy import SitePolicy, TlsSection
from fedlora.site.desk import Desk
from fedlora.site.protocol import Answer, Request

MOST_CONNECTIONS = 32
PATIENCE = 60.0
"""Seconds that a courier may keep still while a request arrives, or an answer is taken."""
LONGEST_SOCKET_PATH = 107
"""Bytes, by the operating system."""

log = logging.getLogger("fedlora.site")


class Daemon:
    """Listens until it is stopped; the round at work then ends as it was begun."""

    def __init__(self, desk: Desk) -> None:
        """Take the policy's socket, and its TLS address where it has one.

        Raises:
            ConfigError: one of them cannot be listened on, or another daemon has it.
        """
        self._desk, self._stopped, self._held = desk, threading.Event(), ExitStack()
        policy, slots = desk.policy, threading.BoundedSemaphore(MOST_CONNECTIONS)
        try:
            self._held.enter_context(_claimed(policy))
            self._listeners = [self._held.enter_context(_listening_locally(desk, slots))]
            if policy.tls is not None:
                self._listeners.append(self._held.enter_context(_listening_by_tls(desk, policy.tls, slots)))
        except BaseException:
            self._held.close()
            raise

    def serve(self) -> None:
        """Answer until `stop` is called."""
        threads = [threading.Thread(target=listener.serve_forever, args=(0.2,)) for listener in self._listeners]
        with self._held:  # closing a listener waits for the requests that it has taken
            for thread in threads:
                thread.start()
            self._stopped.wait()
            self._desk.retire()
            for listener, thread in zip(self._listeners, threads, strict=True):
                listener.shutdown()
                thread.join()

    def stop(self) -> None:
        """Take no more requests. Safe in a signal handler."""
        self._stopped.set()


class _Connection(socketserver.StreamRequestHandler):
    """One request and its answer."""

    timeout = PATIENCE
    server: _Listener

    def setup(self) -> None:
        self.request.settimeout(self.timeout)
        if isinstance(self.request, ssl.SSLSocket):
            self.request.do_handshake()
        super().setup()

    def handle(self) -> None:
        try:
            request = Request.read(self.rfile)  # type: ignore[arg-type]
            answer = self._status() if request.ask == "status" else self.server.desk.answer(request)
        except FedloraError as error:
            log_failure(log, error)
            answer = Answer(code=failure_code(error))
        self.wfile.write(answer.encode())

    def _status(self) -> Answer:
        """For the daemon's own user and for root: other runs' spending is none of a courier's business."""
        if self.server.peer(self.request) not in (os.geteuid(), 0):
            return Answer(code="refused")
        return Answer(facts=self.server.desk.status())


class _Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread for each connection, up to a number; others are closed unheard."""

    request_queue_size = MOST_CONNECTIONS

    def __init__(self, desk: Desk, slots: threading.BoundedSemaphore, address: Any) -> None:
        self.desk, self._slots = desk, slots
        super().__init__(address, _Connection)

    def peer(self, line: socket.socket) -> int | None:
        """User of the process at the other end, as the operating system knows it; None where it does not."""
        if line.family != socket.AF_UNIX:
            return None
        _, user, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return int(user)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self._slots.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("a connection broke; an answer that was made is kept")


class _LocalListener(_Listener):
    address_family = socket.AF_UNIX


class _TlsListener(_Listener):
    """Both sides show certificates; the handshake is left to the connection's own thread."""

    allow_reuse_address = True

    def __init__(self, desk: Desk, slots: threading.BoundedSemaphore, address: Any, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__(desk, slots, address)

    def get_request(self) -> tuple[socket.socket, Any]:
        line, address = super().get_request()
        return self._context.wrap_socket(line, server_side=True, do_handshake_on_connect=False), address


@contextmanager
def _claimed(policy: SitePolicy) -> Iterator[None]:
    """The one daemon of a ledger: its secrets and its line are in one process. Ends with the process, however it does.

    Raises:
        ConfigError: another has it.
    """
    path = policy.ledger.with_suffix(".daemon")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another daemon serves the ledger {policy.ledger}; stop it first, or ask it: fedlora site status"
            ) from error
        yield


@contextmanager
def _listening_locally(desk: Desk, slots: threading.BoundedSemaphore) -> Iterator[_Listener]:
    """At the policy's socket, which its owner may use, and the policy's group where it names one."""
    path, group = desk.policy.beside(desk.policy.site.socket), desk.policy.site.socket_group
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"site.socket = {path} has more than {LONGEST_SOCKET_PATH} bytes, the most that the system allows; "
            "give a shorter path"
        )
    if path.is_socket():
        path.unlink()  # of a daemon that was killed: a living one holds the claim
    before = os.umask(0o177)
    try:
        listener = _LocalListener(desk, slots, str(path))
    except OSError as error:
        raise ConfigError(f"site.socket = {path} cannot be listened on: {error.strerror}; name another") from error
    finally:
        os.umask(before)
    with listener:
        try:
            if group:
                os.chown(path, -1, grp.getgrnam(group).gr_gid)
                path.chmod(0o660)
        except (KeyError, PermissionError) as error:
            raise ConfigError(
                f"site.socket_group = {group}: there is no such group, or this user is not in it; "
                "make the group, and put this user and the courier's into it"
            ) from error
        yield listener
        path.unlink(missing_ok=True)


@contextmanager
def _listening_by_tls(desk: Desk, tls: TlsSection, slots: threading.BoundedSemaphore) -> Iterator[_Listener]:
    host, _, port = tls.address.rpartition(":")
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
        number = int(port)
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(f"tls.address = {tls.address}, wanted a loopback address and a port, such as 127.0.0.1:7443")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(desk.policy.beside(tls.certificate), desk.policy.beside(tls.key))
        context.load_verify_locations(desk.policy.beside(tls.couriers))
        context.verify_mode = ssl.CERT_REQUIRED
        listener = _TlsListener(desk, slots, (host, number), context)
    except OSError as error:  # ssl.SSLError among them
        raise ConfigError(
            f"[tls] in {desk.policy.path} cannot be used: {error.strerror or error}; "
            "see whether its three files are PEM and its address is free"
        ) from error
    with listener:
        yield listener
