"""Health and metrics are for this machine alone, and answer whatever else goes on or goes wrong."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from fedlora.errors import ConfigError
from fedlora.monitoring import metrics
from fedlora.monitoring.metrics import Endpoint


class Told(NamedTuple):
    status: int
    kind: str
    text: str


def ask(port: int, path: str, host: str = "127.0.0.1") -> Told:
    line = http.client.HTTPConnection(host, port, timeout=30)
    try:
        line.request("GET", path)
        answer = line.getresponse()
        return Told(answer.status, answer.headers["Content-Type"], answer.read().decode())
    finally:
        line.close()


Serve = Callable[..., int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(registry, health)` is the port of an endpoint."""
    with ExitStack() as held:
        yield (
            lambda registry, health=str, address="127.0.0.1:0": (
                held.enter_context(Endpoint(address, registry, health, key="site.metrics")).port
            )
        )


def test_metrics_are_those_of_the_registry_and_nothing_of_the_process(serve: Serve) -> None:
    registry = CollectorRegistry()
    Gauge("rounds", "Rounds done.", registry=registry).set(7)
    told = ask(serve(registry), "/metrics")
    assert told.status == 200
    assert told.kind.startswith("text/plain")
    (family,) = text_string_to_metric_families(told.text)
    assert [(sample.name, sample.value) for sample in family.samples] == [("rounds", 7.0)]


def test_health_is_ok_or_a_reason(serve: Serve) -> None:
    reasons = ["", "ledger", ""]
    port = serve(CollectorRegistry(), lambda: reasons.pop(0))
    assert [ask(port, "/health")[::2] for _ in range(3)] == [(200, "ok\n"), (503, "ledger\n"), (200, "ok\n")]


def test_health_answers_while_metrics_wait(serve: Serve) -> None:
    """As long as a ledger is priced, for example."""
    asked, goes_on, registry = threading.Event(), threading.Event(), CollectorRegistry()

    class Slow(Collector):
        def collect(self) -> Iterator[Metric]:
            asked.set()
            assert goes_on.wait(60)
            yield from ()

    registry.register(Slow())
    port = serve(registry)
    waiting = threading.Thread(target=ask, args=(port, "/metrics"))
    waiting.start()
    assert asked.wait(60)
    assert ask(port, "/health").text == "ok\n"
    goes_on.set()
    waiting.join()


def test_what_fails_is_no_answer_and_its_text_stays_here(
    serve: Serve, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    port = serve(CollectorRegistry(), lambda: 1 // 0)
    with pytest.raises(http.client.RemoteDisconnected), caplog.at_level(logging.WARNING):
        ask(port, "/health")
    assert "not answered" in caplog.text
    assert "ZeroDivisionError" not in caplog.text + capfd.readouterr().err
    assert ask(port, "/metrics").status == 200


def test_those_who_say_nothing_keep_nobody_out_for_long(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._Handler, "timeout", 0.5)
    port = serve(CollectorRegistry())
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(2 * metrics.MOST_CONNECTIONS)]
    for _ in range(60):
        try:
            assert ask(port, "/health").text == "ok\n"
            break
        except OSError:  # closed unheard
            time.sleep(0.5)
    else:
        pytest.fail("nobody was ever heard again")
    for line in silent:
        line.close()


def test_other_paths_and_methods_are_refused(serve: Serve) -> None:
    port = serve(CollectorRegistry())
    assert ask(port, "/").status == 404
    assert ask(port, "/health?verbose").status == 200
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    line.request("POST", "/metrics", body=b"x")
    assert line.getresponse().status == 501
    line.close()


def test_ipv6_loopback_will_do(serve: Serve) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        port = serve(CollectorRegistry(), str, "[::1]:0")
    except ConfigError:
        pytest.skip("no IPv6 loopback here")
    assert ask(port, "/health", "::1").text == "ok\n"


ELSEWHERE = ["0.0.0.0:9464", "[::]:9464", "192.168.1.7:9464", "localhost:9464", ":9464", "9464", "127.0.0.1", "x:y"]


@pytest.mark.parametrize("address", [*ELSEWHERE, "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:"])
def test_no_other_address_is_listened_on(address: str) -> None:
    with pytest.raises(ConfigError, match=r"site\.metrics = .*, wanted a loopback address and a port"):
        Endpoint(address, CollectorRegistry(), str, key="site.metrics")


def test_an_address_that_is_taken_is_one_line(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot be listened on: "):
        serve(CollectorRegistry(), str, f"127.0.0.1:{taken.getsockname()[1]}")
