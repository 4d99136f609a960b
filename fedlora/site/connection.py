"""The courier's end of the line to a site's daemon. Standard library only."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedlora.errors import DaemonUnreachable
from fedlora.site.protocol import Answer, Request

CONNECT_SECONDS = 30.0
"""How long a daemon may take to start, again after a kill for example, before a courier gives up."""
_POLL = 0.25


@dataclass(frozen=True, kw_only=True)
class DaemonAddress:
    """Where a daemon listens: a Unix socket's path, or host:port with certificates on both sides."""

    place: str
    authority: str = ""
    """PEM file of who signed the daemon's certificate; with it, `place` is host:port."""
    certificate: str = ""
    key: str = ""

    def ask(self, request: Request, *, limit: float, patience: float = CONNECT_SECONDS) -> Answer:
        """The daemon's answer.

        Args:
            request: what to ask.
            limit: seconds that it may compute.
            patience: seconds within which it has to take the call.

        Raises:
            DaemonUnreachable: nobody takes it, or the line breaks.
            ProtocolError: what answers is no daemon of this version.
        """
        message = request.encode()
        try:
            with self._connected(patience) as line:
                line.sendall(message)
                line.settimeout(limit)
                with line.makefile("rb") as stream:
                    return Answer.read(stream)
        except OSError as error:
            raise DaemonUnreachable(
                f"the site's daemon at {self.place} does not answer: {error.strerror or error}; "
                "is `fedlora site serve` running, and may this user reach its socket?"
            ) from error

    @contextmanager
    def _connected(self, patience: float) -> Iterator[socket.socket]:
        end = time.monotonic() + patience
        while True:
            try:
                line = self._connect()
                break
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):  # it may be starting, or overrun
                if time.monotonic() > end:
                    raise
                time.sleep(_POLL)
        with line:
            yield line

    def _connect(self) -> socket.socket:
        if self.authority:
            return self._connect_by_tls()
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            line.settimeout(CONNECT_SECONDS)
            line.connect(self.place)
        except BaseException:
            line.close()
            raise
        return line

    def _connect_by_tls(self) -> ssl.SSLSocket:
        host, _, port = self.place.rpartition(":")
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=self.authority)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.certificate, self.key)
        line = socket.create_connection((host, int(port)), CONNECT_SECONDS)
        try:
            return context.wrap_socket(line, server_hostname=host)
        except BaseException:
            line.close()
            raise
