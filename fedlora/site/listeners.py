"""Connections to a site's desk: how many at once, how long they may take, how much they may send.

Who may reach a socket may still be hostile. All that he can do is to keep others out for as long as he is let.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fedlora.errors import FedloraError
from fedlora.federation.failures import failure_code, log_failure
from fedlora.listening import BoundedThreads
from fedlora.site.desk import Desk
from fedlora.site.protocol import LARGEST_PAYLOAD, Answer, Request

MOST_CONNECTIONS = 32
MOST_BYTES = 2 * LARGEST_PAYLOAD
"""Of the payloads of all connections together."""
PATIENCE = 60.0
"""Seconds within which a request has to have arrived as a whole, and an answer has to be taken."""

log = logging.getLogger("fedlora.site")


class Slots:
    """What all listeners of a daemon share: how many connections there may be, and how much they may send together."""

    def __init__(self) -> None:
        self.connections = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._bytes, self._lock = 0, threading.Lock()

    @contextmanager
    def payload(self) -> Iterator[Callable[[int], None]]:
        """Takes room for one payload, which is free again at the end.

        The function given raises BlockingIOError where there is none.
        """
        taken = 0

        def make_room(size: int) -> None:
            nonlocal taken
            with self._lock:
                if self._bytes + size > MOST_BYTES:
                    raise BlockingIOError(f"{size} bytes more than the daemon takes at once")
                self._bytes, taken = self._bytes + size, taken + size

        try:
            yield make_room
        finally:
            with self._lock:
                self._bytes -= taken


class _Connection(socketserver.StreamRequestHandler):
    """One request and its answer."""

    timeout = PATIENCE
    server: Listener

    def setup(self) -> None:
        self.request.settimeout(self.timeout)
        if isinstance(self.request, ssl.SSLSocket):
            with self.server.receiving(self.request):
                self.request.do_handshake()
        super().setup()

    def handle(self) -> None:
        with self.server.slots.payload() as make_room:
            self.wfile.write(self._answer(make_room).encode())

    def _answer(self, make_room: Callable[[int], None]) -> Answer:
        try:
            with self.server.receiving(self.request):
                request = Request.read(self.rfile, make_room)  # type: ignore[arg-type]
            return self._status() if request.ask == "status" else self.server.desk.answer(request)
        except BlockingIOError:
            log.warning("a request was turned away: others are too large to take it as well")
            return Answer(code="busy")
        except FedloraError as error:
            log_failure(log, error)
            return Answer(code=failure_code(error))

    def _status(self) -> Answer:
        """For the daemon's own user and for root: other runs' spending is none of a courier's business."""
        if self.server.peer(self.request) not in (os.geteuid(), 0):
            return Answer(code="refused")
        return Answer(facts=self.server.desk.status())


class Listener(BoundedThreads, socketserver.TCPServer):
    """Takes connections to a desk."""

    request_queue_size = MOST_CONNECTIONS

    def __init__(self, desk: Desk, slots: Slots, address: Any) -> None:
        self.desk, self.slots = desk, slots
        self._receiving: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(slots.connections, address, _Connection)

    @contextmanager
    def receiving(self, line: socket.socket) -> Iterator[None]:
        """Meanwhile a request arrives on `line`, which is cut if that takes too long or the daemon is to stop."""
        with self._lock:
            self._receiving[line] = time.monotonic() + PATIENCE
        try:
            yield
        finally:
            with self._lock:
                del self._receiving[line]

    def service_actions(self) -> None:
        self._cut(before=time.monotonic())

    def server_close(self) -> None:
        self._cut(before=math.inf)
        super().server_close()

    def _cut(self, before: float) -> None:
        with self._lock:
            for line, end in self._receiving.items():
                if end <= before:
                    with suppress(OSError):  # it is gone already
                        socket.socket.shutdown(line, socket.SHUT_RDWR)  # TLS has no say in it

    def peer(self, line: socket.socket) -> int | None:
        """User of the process at the other end, as the operating system knows it; None where it does not."""
        if line.family != socket.AF_UNIX:
            return None
        _, user, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return int(user)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, ssl.SSLError):  # its reason is a name of OpenSSL's
            log.warning("a connection over TLS was refused: %s", error.reason or "it broke")
        else:
            log.warning("a connection broke; if an answer had been made, it is kept")


class LocalListener(Listener):
    address_family = socket.AF_UNIX


class TlsListener(Listener):
    """Both sides show certificates; the handshake is left to the connection's own thread."""

    allow_reuse_address = True

    def __init__(self, desk: Desk, slots: Slots, address: Any, context: ssl.SSLContext) -> None:
        self._context = context
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(desk, slots, address)

    def get_request(self) -> tuple[socket.socket, Any]:
        line, address = super().get_request()
        return self._context.wrap_socket(line, server_side=True, do_handshake_on_connect=False), address
