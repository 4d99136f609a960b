"""A site's desk behind its sockets: who may knock, one daemon for a ledger, and an end that loses nothing."""

from __future__ import annotations

import grp
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedlora.claims import claim
from fedlora.errors import ConfigError
from fedlora.listening import loopback_address
from fedlora.privacy.policy import SitePolicy, TlsSection
from fedlora.site.desk import Desk
from fedlora.site.listeners import Listener, LocalListener, Slots, TlsListener

LONGEST_SOCKET_PATH = 107
"""Bytes, by the operating system."""


class Daemon:
    """Listens until it is stopped; the round at work then ends as it was begun."""

    def __init__(self, desk: Desk) -> None:
        """Take the policy's socket, and its TLS address where it has one.

        Raises:
            ConfigError: one of them cannot be listened on, or another daemon has it.
        """
        self._desk, self._stopped, self._held = desk, threading.Event(), ExitStack()
        policy, slots = desk.policy, Slots()
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


@contextmanager
def _claimed(policy: SitePolicy) -> Iterator[None]:
    """The one daemon of a ledger: its secrets and its line are in one process. Ends with the process, however it does.

    Raises:
        ConfigError: another has it.
    """
    refusal = f"another daemon serves the ledger {policy.ledger}; stop it first, or ask it: fedlora site status"
    descriptor = os.open(claim_file(policy), os.O_RDWR | os.O_CREAT, 0o600)  # who can read it can hold the claim
    with os.fdopen(descriptor, "w") as file:
        claim(file, ConfigError(refusal))
        yield


def claim_file(policy: SitePolicy) -> Path:
    """Beside the ledger; claimed by the daemon that serves it."""
    return policy.ledger.with_suffix(".daemon")


@contextmanager
def _listening_locally(desk: Desk, slots: Slots) -> Iterator[Listener]:
    """At the policy's socket, which its owner may use, and the policy's group where it names one."""
    path, group = desk.policy.beside(desk.policy.site.socket), desk.policy.site.socket_group
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"site.socket = {path} has more than {LONGEST_SOCKET_PATH} bytes, the most that the system allows; "
            "give a shorter path"
        )
    if path.is_socket():
        path.unlink()  # of a daemon that was killed: a living one holds the claim
    before = os.umask(0o117 if group else 0o177)
    try:
        listener = LocalListener(desk, slots, str(path))
    except OSError as error:
        raise ConfigError(f"site.socket = {path} cannot be listened on: {error.strerror}; name another") from error
    finally:
        os.umask(before)
    with listener:
        try:
            if group:
                _give_to_group(path, group)
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _give_to_group(path: Path, group: str) -> None:
    """The socket, but nothing through a link: who may write to its folder could have put one in its place by now."""
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid, follow_symlinks=False)
    except (KeyError, PermissionError) as error:
        raise ConfigError(
            f"site.socket_group = {group}: there is no such group, or this user is not in it; "
            "make the group, and put this user and the courier's into it"
        ) from error


@contextmanager
def _listening_by_tls(desk: Desk, tls: TlsSection, slots: Slots) -> Iterator[Listener]:
    address = loopback_address(tls.address, "tls.address")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(desk.policy.beside(tls.certificate), desk.policy.beside(tls.key))
        context.load_verify_locations(desk.policy.beside(tls.couriers))
        context.verify_mode = ssl.CERT_REQUIRED
        listener = TlsListener(desk, slots, address, context)
    except OSError as error:  # ssl.SSLError among them
        raise ConfigError(
            f"[tls] in {desk.policy.path} cannot be used: {error.strerror or error}; "
            "see whether its three files are PEM and its address is free"
        ) from error
    with listener:
        yield listener
