"""Health and Prometheus metrics over HTTP, for whoever is on this machine: loopback only, and public facts only.

    GET /metrics   what the registry's collectors say
    GET /health    200 "ok", or 503 and one word that says why not

Every user of the machine can read it, a courier's too. A registry has no collectors of its own here: the usual ones
tell processor time and memory of the process, in which a private batch's size shows.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer
from types import TracebackType
from typing import Any, Self

from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import CollectorRegistry

from fedlora.errors import ConfigError
from fedlora.listening import BoundedThreads, loopback_address

MOST_CONNECTIONS = 8
PATIENCE = 10.0
"""Seconds that somebody may keep still while asking, or while the answer is taken."""

log = logging.getLogger(__name__)


class Endpoint:
    """Answers from a thread of its own for as long as it is entered, also while others compute."""

    def __init__(self, address: str, registry: CollectorRegistry, health: Callable[[], str], *, key: str) -> None:
        """Listen at `address`.

        Args:
            address: loopback address and port, such as 127.0.0.1:9464 or [::1]:9464. Port 0 takes a free one.
            registry: of what /metrics says.
            health: why this process cannot do its work, in one word; empty where it can. Must not wait for anyone.
            key: the setting that `address` comes from, for messages.

        Raises:
            ConfigError: it is no loopback address, or cannot be listened on.
        """
        host, port = loopback_address(address, key)
        try:
            self._server = _Server(host, port, registry, health)
        except OSError as error:
            raise ConfigError(
                f"{key} = {address} cannot be listened on: {error.strerror}; name another port"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="metrics", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE
    server: _Server
    server_version, sys_version = "fedlora", ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health":
            reason = self.server.health()
            self._answer(503 if reason else 200, "text/plain; charset=utf-8", f"{reason or 'ok'}\n".encode())
        elif path == "/metrics":
            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, kind, encode(self.server.registry))
        else:
            self._answer(404, "text/plain; charset=utf-8", b"there are /metrics and /health\n")

    def _answer(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """A log is for rounds, not for being looked at."""


class _Server(BoundedThreads, TCPServer):
    """No `HTTPServer`: that asks a name service for its own name."""

    allow_reuse_address = True
    daemon_threads, block_on_close = True, False

    def __init__(self, host: str, port: int, registry: CollectorRegistry, health: Callable[[], str]) -> None:
        self.registry, self.health = registry, health
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__(threading.BoundedSemaphore(MOST_CONNECTIONS), (host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("a look at health or metrics was not answered")
