"""A daemon in a process of its own, as its owner starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.privacy.ledger import Ledger
from fedlora.site.connection import DaemonAddress
from fedlora.site.protocol import Answer, Request
from tests.site.conftest import SiteFolder

LONG = 60.0
"""Seconds after which something that has to happen has not."""


@dataclass(kw_only=True)
class DaemonProcess:
    """`fedlora site serve`, which ends with the block."""

    folder: SiteFolder
    socket: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> DaemonProcess:
        with (self.folder.path / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedlora", "site", "serve", str(self.folder.settings)],
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
            )
        self.ask(Request(ask="status"))
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGKILL)

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, request: Request) -> Answer:
        return DaemonAddress(place=str(self.socket)).ask(request, limit=LONG, patience=LONG)

    def end(self, number: signal.Signals) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(LONG)

    def wait_until(self, kinds: list[str]) -> None:
        """Until the rows of the ledger are of these kinds."""
        end = time.monotonic() + LONG
        while self.kinds() != kinds:
            assert time.monotonic() < end, f"the ledger has {self.kinds()}"
            time.sleep(0.01)

    def kinds(self) -> list[str]:
        ledger = Ledger.read(self.folder.path / "ledger.sqlite")
        try:
            return [entry.kind for entry in ledger.entries()]
        finally:
            ledger.close()
