"""A real daemon that is told to end, or killed, in the middle of a round."""

from __future__ import annotations

import signal
import threading

import pytest

from fedlora.errors import DaemonUnreachable
from fedlora.privacy.ledger import Ledger
from fedlora.site.protocol import Answer
from tests.site.conftest import Asking, SiteFolder, update_in
from tests.site.process import DaemonProcess

STEPS = 60
"""Of a round that goes on for a second or more."""

pytestmark = pytest.mark.slow


@pytest.fixture
def daemon(site_folder: SiteFolder) -> DaemonProcess:
    site_folder.write_policy(("most_steps_per_round = 2", f"most_steps_per_round = {STEPS}"))
    return DaemonProcess(folder=site_folder, socket=site_folder.socket)


@pytest.fixture
def long_rounds(asking: Asking) -> Asking:
    return asking.under(f"federation.local_steps={STEPS}")


def test_told_to_end_it_ends_its_round_and_keeps_the_answer(
    daemon: DaemonProcess, long_rounds: Asking, site_folder: SiteFolder
) -> None:
    found: list[Answer] = []
    with daemon:
        daemon.ask(long_rounds.round(0))
        caller = threading.Thread(target=lambda: found.append(daemon.ask(long_rounds.round(1))))
        caller.start()
        daemon.wait_until(["reserved", "spent", "reserved"])
        assert daemon.end(signal.SIGTERM) == 0
        caller.join()
    update_in(found[0])
    assert not site_folder.socket.exists()
    with DaemonProcess(folder=site_folder, socket=site_folder.socket) as again:
        assert again.ask(long_rounds.round(1)) == found[0]
        assert again.kinds() == ["reserved", "spent"] * 2


def test_killed_it_has_spent_the_round_and_begins_the_next(
    daemon: DaemonProcess, long_rounds: Asking, site_folder: SiteFolder
) -> None:
    codes: list[str] = []

    def call() -> None:
        try:
            codes.append(daemon.ask(long_rounds.round(1)).code)
        except DaemonUnreachable:
            codes.append("unreachable")

    with daemon:
        update_in(daemon.ask(long_rounds.round(0)))
        caller = threading.Thread(target=call)
        caller.start()
        daemon.wait_until(["reserved", "spent", "reserved"])
        daemon.end(signal.SIGKILL)
        caller.join()
    assert codes == ["unreachable"], "and so it is asked again"
    assert site_folder.socket.is_socket(), "left behind"
    with DaemonProcess(folder=site_folder, socket=site_folder.socket) as again:
        assert again.ask(long_rounds.round(1)).code == "over"
        assert again.kinds() == ["reserved", "spent", "reserved"], "paid once, and never given"
        update_in(again.ask(long_rounds.round(2)))
    ledger = Ledger.read(site_folder.path / "ledger.sqlite")
    ledger.verify()
    ledger.close()
