"""What every socket of fedlora has in common: an address on this machine alone, and an end to how many are heard."""

from __future__ import annotations

import ipaddress
import socketserver
import threading
from typing import Any

from fedlora.errors import ConfigError


class BoundedThreads(socketserver.ThreadingMixIn):
    """A thread for each connection of a `socketserver` server, up to a number; others are closed unheard."""

    def __init__(self, places: threading.BoundedSemaphore, *rest: Any) -> None:
        """Listen as the server that this is mixed into.

        Args:
            places: one for each connection; servers that have it in common share the number.
            rest: for that server.
        """
        self._places = places
        super().__init__(*rest)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self._places.acquire(blocking=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request(request, client_address)
        except BaseException:  # the system gives no thread for it
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()


def loopback_address(address: str, key: str) -> tuple[str, int]:
    """Host and port in `address`, such as 127.0.0.1:9464 or [::1]:9464, which the setting `key` gives.

    Raises:
        ConfigError: it is no loopback address with a port.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        usable = ipaddress.ip_address(host).is_loopback and 0 <= int(port) < 65536
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            f"{key} = {address}, wanted a loopback address and a port, such as 127.0.0.1:9464; "
            "who is elsewhere comes through a tunnel or a proxy of the owner's"
        )
    return host, int(port)
