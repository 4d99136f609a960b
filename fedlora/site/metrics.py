"""A site's daemon for Prometheus: how requests were answered and what is spent, out of what its status tells anyway.

Neither how long anything took nor how large it was: a batch's size is private, and shows in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from fedlora.monitoring.metrics import Endpoint
from fedlora.site.desk import Desk
from fedlora.site.health import health


@contextmanager
def shown_metrics(desk: Desk) -> Iterator[None]:
    """Health and metrics of `desk` at the policy's address meanwhile, where it names one.

    Raises:
        ConfigError: it is no loopback address, or cannot be listened on.
    """
    address, registry = desk.policy.site.metrics, CollectorRegistry()
    registry.register(SiteMetrics(desk))
    with Endpoint(address, registry, lambda: health(desk.policy), key="site.metrics") if address else nullcontext():
        yield


class SiteMetrics(Collector):
    """`Desk.status` as metrics; an ε is priced anew only where something was charged since."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def collect(self) -> Iterator[Metric]:
        facts = self._desk.status()
        yield InfoMetricFamily("fedlora_site", "What serves this site.", {"version": facts["fedlora_version"]})
        yield _gauge("fedlora_site_healthy", "1 where rounds can be done, by /health.", facts["health"] == "ok")
        writable = facts["health"] != "ledger"
        yield _gauge("fedlora_site_ledger_writable", "1 where the next charge can be written.", writable)
        yield _gauge("fedlora_site_at_work", "1 while a request is at work.", facts["at_work"])
        requests = CounterMetricFamily(
            "fedlora_site_requests", "Requests answered since the start.", labels=("ask", "code")
        )
        for answer in facts["answers"]:
            requests.add_metric((answer["ask"], answer["code"]), answer["count"])
        yield requests
        for name, help_text in _BUDGETS.items():
            family = GaugeMetricFamily(f"fedlora_site_{name}", help_text, labels=("data_set",))
            for data_set in facts["data_sets"]:
                if data_set[name] is not None:  # the ledger cannot be read, or the policy no longer names it
                    family.add_metric((data_set["name"],), data_set[name])
            yield family


_BUDGETS = {
    "epsilon_counted": "ε of all that was ever charged to the data set, at max_delta.",
    "max_epsilon": "Its cap.",
    "max_delta": "δ of both.",
}


def _gauge(name: str, help_text: str, value: Any) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_text, float(value))
