"""Processes that can be started, stopped, killed and started again one by one, and that leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from fedlora.errors import FedloraError
from server.superlink import QUIET

MARK = "FEDLORA_LOOPBACK"
"""Environment variable that every process of a service inherits, also those that leave its group and session."""
READY_WITHIN = 60.0
RESTARTED_WITHIN = 150.0
RESTART_AFTER = 2.0
STOP_WITHIN = 15.0
POLL = 0.05


@dataclass(kw_only=True)
class Service:
    """One long-lived command, in an empty folder of its own, its output in a log that survives restarts.

    Whatever it starts carries its mark and so can be found: the SuperLink puts children into sessions of their own.
    """

    name: str
    command: Sequence[str]
    folder: Path
    """`empty/`, where it runs, and `log` are made here."""
    environment: dict[str, str]
    """May be changed between two starts."""
    ready: Callable[[Service], bool]
    """Whether it can be used by now; asked again and again while it starts."""
    _mark: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _log_start: int = field(default=0, init=False)

    @property
    def pid(self) -> int:
        """Of the command itself, the last time it was started."""
        if self._process is None:
            raise FedloraError(f"{self.name} was never started")
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None as long as it runs; minus the signal's number where a signal ended it."""
        return None if self._process is None else self._process.poll()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, within: float = READY_WITHIN) -> None:
        """Start it and wait until it can be used.

        Raises:
            FedloraError: it ended, or is not ready in time; with the end of its log.
        """
        self.launch()
        self.wait_ready(within)

    def restart(self, within: float = RESTARTED_WITHIN) -> None:
        """Start it again and again until it can be used, as systemd does.

        A SuperNode that was killed is refused until the SuperLink has missed its heartbeat for a minute.

        Raises:
            FedloraError: as the last `start`.
        """
        last = time.monotonic() + within
        while True:
            try:
                return self.start(last - time.monotonic())
            except FedloraError:
                if self.alive or time.monotonic() > last:
                    raise
            time.sleep(RESTART_AFTER)

    def launch(self) -> None:
        """Start it and do not wait."""
        if self.alive:
            raise FedloraError(f"{self.name} runs already as {self.pid}")
        (self.folder / "empty").mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self.command,
                cwd=self.folder / "empty",
                env={**self.environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, within: float = READY_WITHIN) -> None:
        end = time.monotonic() + within
        while not self.ready(self):
            if not self.alive:
                raise FedloraError(
                    f"{self.name} ended with {self.exit_code} before it was ready:\n{self.log()[-3000:]}"
                )
            if time.monotonic() > end:
                raise FedloraError(f"{self.name} is not ready after {within:g} s:\n{self.log()[-3000:]}")
            time.sleep(POLL)

    def terminate(self) -> None:
        """SIGTERM to the command and to all it started, as systemd does; without waiting."""
        self._signal(signal.SIGTERM)

    def stop(self, within: float = STOP_WITHIN) -> None:
        """As `terminate`, and SIGKILL to what is left after `within` seconds."""
        self.terminate()
        last = time.monotonic() + within
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(within)
        end(self.processes(), within=max(0.0, last - time.monotonic()))
        if self._process is not None:
            self._process.wait()

    def kill(self) -> None:
        """SIGKILL to the command only, as a crash would: what it started is left to itself."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """SIGSTOP to the command and all it started: a machine that hangs."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def log(self, *, whole: bool = False) -> str:
        """What it and its children printed since the last start, or since the first."""
        if not self._log_path.exists():
            return ""
        with self._log_path.open("rb") as file:
            file.seek(0 if whole else self._log_start)
            return file.read().decode(errors="replace")

    def processes(self, command: str = "") -> list[psutil.Process]:
        """Living processes of this service whose command line contains `command`, itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and command in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # gone meanwhile, or another user's
                continue
        return found

    @property
    def _log_path(self) -> Path:
        return self.folder / "log"

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def end(processes: Iterable[psutil.Process], within: float) -> None:
    """Let `processes` go by themselves, and kill those that do not."""
    _, left = psutil.wait_procs([*processes], timeout=within)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()  # psutil looks whether the id still belongs to the process it found
    psutil.wait_procs(left, timeout=within)


def quiet_environment(executables: Path, **more: str) -> dict[str, str]:
    """This process's environment for Flower: nothing calls home, nothing is installed, no code is found by accident.

    Args:
        executables: folder of flower-superexec and its like, which Flower looks for on the PATH.
        more: further variables.
    """
    inherited: Mapping[str, str] = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        **inherited,
        "PATH": os.pathsep.join([str(executables), inherited.get("PATH", os.defpath)]),
        **QUIET,
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
        "FLWR_LOG_LEVEL": "INFO",  # that a service is ready is read from its log
        **more,
    }
