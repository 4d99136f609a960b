"""Flower's command, asked about one SuperLink: submit a run, see how it stands. Its exit codes say nothing of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.errors import FedloraError

FLWR = Path(sys.executable).with_name("flwr")
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of every process of Flower's: nothing calls home, nothing is installed."""
COMMAND_LIMIT = 120.0
"""Seconds that Flower's command may take."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What the SuperLink says of a run."""

    status: str
    """pending, starting, running, or finished:completed, finished:failed, finished:stopped."""
    details: str
    """Why it failed; the server app's exception, where it was one."""

    @property
    def finished(self) -> bool:
        return self.status.startswith("finished")

    @property
    def completed(self) -> bool:
        return self.status == "finished:completed"


@dataclass(frozen=True, kw_only=True)
class SuperLink:
    """A SuperLink as whoever submits runs sees it."""

    connection: str
    """Its name in Flower's own configuration, $FLWR_HOME/config.toml."""
    environment: Mapping[str, str] | None = None
    """Of Flower's command; None: this process's own."""

    def submit(self, config: Mapping[str, Any], app: Path) -> int:
        """Start a run; its number at the SuperLink.

        Args:
            config: dotted keys of `[tool.flwr.app.config]` and their values.
            app: the folder to send.

        Raises:
            FedloraError: Flower does not take the run; with its own words.
        """
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(tomli_w.dumps(_nested(config)))
            file.flush()
            chosen = ["--run-config", file.name] if config else []
            return int(self._ask("run", str(app), self.connection, *chosen)["run-id"])

    def status(self, run: int) -> RunStatus:
        """How a run stands.

        Raises:
            FedloraError: Flower's command fails; with its own words.
        """
        (found,) = self._ask("ls", self.connection, "--run-id", str(run))["runs"]
        return RunStatus(status=str(found["status"]), details=str(found.get("status-details") or ""))

    def _ask(self, *arguments: str) -> dict[str, Any]:
        command = [str(FLWR), *arguments, "--format", "json"]
        environment = {**(os.environ if self.environment is None else self.environment), **QUIET}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=COMMAND_LIMIT
            )
        except subprocess.TimeoutExpired as error:
            raise FedloraError(f"flwr {arguments[0]} does not end within {COMMAND_LIMIT:g} s") from error
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = {}
        if done.returncode or not isinstance(answer, dict) or answer.get("success") is False:
            said = str(answer.get("error-message") or done.stderr or done.stdout).strip().splitlines()
            raise FedloraError(f"flwr {arguments[0]} failed: {said[-1] if said else 'it says nothing'}")
        return answer


def _nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """`{"run.out": x}` as TOML's tables."""
    tables: dict[str, Any] = {}
    for key, value in dotted.items():
        section, _, name = key.rpartition(".")
        (tables.setdefault(section, {}) if section else tables)[name] = value
    return tables
