"""Prometheus: a run's server tells whoever scrapes it on this machine. Nothing is sent anywhere.

For a deployed server, whose environment names the address in FEDLORA_METRICS; the address answers while the run does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Enum, Gauge, Info
from prometheus_client.registry import CollectorRegistry

import fedlora
from fedlora.config import RunConfig
from fedlora.experiments.trackers.tracker import Tracker
from fedlora.federation.schedule import make_schedule
from fedlora.listening import loopback_address
from fedlora.monitoring.metrics import Endpoint

if TYPE_CHECKING:
    from fedlora.federation.server import RoundReport

VARIABLE = "FEDLORA_METRICS"
"""Environment variable with a loopback address and a port, such as 127.0.0.1:9465."""


def trackers_from(environment: Mapping[str, str]) -> list[Tracker]:
    """The tracker that FEDLORA_METRICS asks for; none where it is not set.

    Raises:
        ConfigError: it is no loopback address.
    """
    address = environment.get(VARIABLE, "")
    return [Prometheus(address)] if address else []


class Prometheus:
    """Health and metrics of one run at a loopback address."""

    name = "prometheus"

    def __init__(self, address: str) -> None:
        loopback_address(address, VARIABLE)
        self._address, self._registry = address, CollectorRegistry()
        self._metrics = _Metrics(self._registry)

    def start(self, config: RunConfig, folder: Path, *, first_round: int) -> None:
        self._metrics.begin(config, folder, first_round)
        self._endpoint = Endpoint(self._address, self._registry, lambda: "", key=VARIABLE)
        self._endpoint.__enter__()

    def round(self, report: RoundReport) -> None:
        self._metrics.tell(report)

    def finish(self, record: Mapping[str, Any]) -> None:
        self._metrics.state.state("done")

    def close(self, *, whole: bool) -> None:
        if not whole:
            self._metrics.state.state("failed")
        self._endpoint.__exit__(None, None, None)


class _Metrics:
    """What is told of a run; all of it is in rounds.jsonl, too."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"fedlora_run_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"fedlora_run_{name}", text, labels, registry=registry)

        self.info = Info("fedlora_run", "Which run this is.", registry=registry)
        self.state = Enum(
            "fedlora_run_state", "How it stands.", states=["running", "done", "failed"], registry=registry
        )
        self.planned = gauge("rounds_planned", "Rounds of the whole run.")
        self.done = gauge("rounds_done", "Rounds that are over.")
        self.phase = gauge("phase", "1 for the phase of the last round.", "phase")
        self.metric = gauge("metric", "On public validation data, after the last round that was evaluated.", "name")
        self.epsilon_asked = gauge("epsilon_asked", "ε that the run may spend at each client.")
        self.epsilon_max = gauge("epsilon_max", "The most that a client has spent so far.")
        self.clients = gauge("clients", "Clients of the last round, by whether they answered usably.", "state")
        self.failures = counter("failures", "Clients that did not, since this process began, by code.", "code")
        self.bytes = counter("bytes", "Traffic since this process began; up is to the server.", "direction")
        self.seconds = gauge("round_seconds", "Duration of the last round.")

    def begin(self, config: RunConfig, folder: Path, first_round: int) -> None:
        self.info.info(
            {
                "task": config.data.task,
                "method": config.adapter.method,
                "folder": folder.name,
                "configuration": config.digest()[:16],
                "version": fedlora.__version__,
            }
        )
        self.planned.set(len(make_schedule(config)))
        self.done.set(first_round)
        self.epsilon_asked.set(config.privacy.epsilon)

    def tell(self, report: RoundReport) -> None:
        self.done.set(report.round + 1)
        self.phase.clear()
        self.phase.labels(report.phase).set(1)
        for name, value in report.metrics.items():
            self.metric.labels(name).set(value)
        self.epsilon_max.set(report.epsilon_max)
        self.clients.labels("ok").set(report.clients_ok)
        self.clients.labels("failed").set(report.clients_failed)
        for code in report.failures.values():
            self.failures.labels(code).inc()
        self.bytes.labels("up").inc(report.bytes_up)
        self.bytes.labels("down").inc(report.bytes_down)
        self.seconds.set(report.seconds)
