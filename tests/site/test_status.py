"""What a site's owner sees of the daemon: a table, JSON, metrics; and a clear line where there is none."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from fedlora.errors import ConfigError, DaemonUnreachable
from fedlora.privacy import accounting
from fedlora.site import health as healths
from fedlora.site import listeners
from fedlora.site.connection import DaemonAddress
from fedlora.site.daemon import Daemon
from fedlora.site.desk import Desk
from fedlora.site.health import health
from fedlora.site.metrics import SiteMetrics, shown_metrics
from fedlora.site.protocol import Answer
from tests.command_line import Said, typed
from tests.site.conftest import Asking, SiteFolder

Type = Callable[..., Said]


@pytest.fixture
def desk(site_folder: SiteFolder) -> Iterator[Desk]:
    opened = Desk(site_folder.settings)
    yield opened
    opened.close()


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Type:
    """`say("--json")` is `fedlora site status --json`."""
    return lambda *arguments: typed(("site", "status", *arguments), monkeypatch, capfd)


@contextmanager
def serving(desk: Desk) -> Iterator[None]:
    daemon = Daemon(desk)
    thread = threading.Thread(target=daemon.serve)
    thread.start()
    try:
        yield
    finally:
        daemon.stop()
        thread.join()


def test_the_table_has_budgets_and_answers(desk: Desk, asking: Asking, site_folder: SiteFolder, say: Type) -> None:
    for request in (asking.enrol(), asking.round(0), asking.round(0), asking.under("privacy.epsilon=7").round(0)):
        desk.answer(request)
    with serving(desk):
        said = say(site_folder.settings)
        facts = json.loads(say(site_folder.settings, "--json").out)
    assert said.code == 0
    rows = [line.split() for line in said.out.splitlines()]
    (spent,) = [row for row in rows if row[:1] == ["ward"]]
    counted, left = float(spent[2]), float(spent[4])
    assert 0 < counted < 6
    assert counted + left == pytest.approx(6, abs=0.002)
    assert spent == ["ward", "sst2", spent[2], "6", spent[4], "0.001"]
    assert [row for row in rows if row[:1] in (["enrol"], ["round"])] == [
        ["enrol", "ok", "1"],
        ["round", "ok", "2"],
        ["round", "refused", "1"],
    ]
    assert "waiting for requests" in said.out
    assert facts["data_sets"][0]["epsilon_counted"] == pytest.approx(counted, rel=1e-3)
    assert facts == desk.status()


def test_a_site_that_nobody_asked_and_that_is_ill_says_so(desk: Desk, site_folder: SiteFolder, say: Type) -> None:
    with serving(desk):
        site_folder.settings.write_text(site_folder.settings.read_text() + "\n[lmits]\n")
        broken = say(_copy(site_folder))
    assert broken.code == 0
    assert "the policy cannot be used, so that every request is refused" in broken.out
    assert "nobody has asked anything" in broken.out
    assert "ward" in broken.out, "what was spent is told by the policy of before"


def _copy(folder: SiteFolder) -> Path:
    """A policy that can be read and names the same socket."""
    sound = folder.path / "sound.toml"
    sound.write_text(folder.settings.read_text().replace("\n[lmits]\n", ""))
    return sound


def test_a_cap_that_was_raised_since_the_start_is_told(desk: Desk, site_folder: SiteFolder) -> None:
    site_folder.write_policy(("max_epsilon = 6.0", "max_epsilon = 7.5"))
    assert desk.status()["data_sets"][0]["max_epsilon"] == 7.5


def test_without_a_daemon_the_line_says_how_to_start_one(site_folder: SiteFolder, say: Type) -> None:
    for _ in range(2):
        said = say(site_folder.settings)
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
        assert f"no daemon answers at {site_folder.socket}" in said.err
        assert f"fedlora site serve {site_folder.settings}" in said.err
        site_folder.socket.touch()  # as if one had been killed


def test_another_user_is_told_whom_to_ask(
    desk: Desk, site_folder: SiteFolder, say: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners.Listener, "peer", lambda self, line: 12345)
    with serving(desk):
        refused = say(site_folder.settings)

    def closed(self: DaemonAddress, *arguments: Any, **how: Any) -> Answer:
        raise DaemonUnreachable("the socket is another's") from PermissionError(13, "Permission denied")

    monkeypatch.setattr(DaemonAddress, "ask", closed)
    for said in (refused, say(site_folder.settings)):
        assert (said.code, said.out) == (2, "")
        assert "tells its status to its own user and to root; ask as one of them" in said.err


def test_a_daemon_of_another_version_is_one_line(
    site_folder: SiteFolder, say: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DaemonAddress, "ask", lambda self, *arguments, **how: Answer(facts={"version": 9}))
    said = say(site_folder.settings)
    assert (said.code, said.out) == (1, "")
    assert "of another version" in said.err


def samples(desk: Desk) -> dict[str, float]:
    """Metrics of `desk` by name and labels."""
    registry = CollectorRegistry()
    registry.register(SiteMetrics(desk))
    found = [sample for family in registry.collect() for sample in family.samples]
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in found}


def test_metrics_are_public_facts_and_no_others(desk: Desk, asking: Asking) -> None:
    desk.answer(asking.enrol())
    desk.answer(asking.round(0))
    desk.answer(asking.under("privacy.epsilon=7").round(0))
    found = samples(desk)
    version = next(name for name in found if name.startswith("fedlora_site_info "))
    counted = desk.status()["data_sets"][0]["epsilon_counted"]
    assert counted > 0
    assert found == {
        version: 1.0,
        "fedlora_site_healthy": 1.0,
        "fedlora_site_ledger_writable": 1.0,
        "fedlora_site_at_work": 0.0,
        "fedlora_site_requests_total enrol ok": 1.0,
        "fedlora_site_requests_total round ok": 1.0,
        "fedlora_site_requests_total round refused": 1.0,
        "fedlora_site_epsilon_counted ward": counted,
        "fedlora_site_max_epsilon ward": 6.0,
        "fedlora_site_max_delta ward": 0.001,
    }


def test_a_budget_is_priced_only_after_a_charge(desk: Desk, asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    priced = []
    pld = accounting._pld_epsilon
    monkeypatch.setattr(accounting, "_pld_epsilon", lambda *how: (priced.append(how), pld(*how))[1])
    desk.answer(asking.round(0))
    priced.clear()
    accounting._epsilon_of_merged.cache_clear()
    before = [samples(desk) for _ in range(5)]
    assert len(priced) == 1
    desk.answer(asking.round(1))
    priced.clear()
    after = [samples(desk) for _ in range(5)]
    assert len(priced) <= 1  # the charge may have priced it
    assert before == before[:1] * 5
    assert after == after[:1] * 5
    name = "fedlora_site_epsilon_counted ward"
    assert after[0][name] > before[0][name]


def test_a_ledger_that_cannot_be_read_is_no_number(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk._ledger.close()
    assert desk.status()["data_sets"][0]["epsilon_counted"] is None
    assert "fedlora_site_epsilon_counted ward" not in samples(desk)


def test_health_names_what_is_wrong(desk: Desk, site_folder: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = desk.policy
    assert health(policy) == ""
    site_folder.settings.write_text("[site")
    assert health(policy) == "policy"
    monkeypatch.setattr(healths, "LEAST_ROOM", 2**80)
    assert health(policy) == "disk"
    for name, word in (("answers.sqlite", "answers"), ("ledger.sqlite", "ledger")):
        (site_folder.path / name).rename(site_folder.path / f"{name}.away")
        assert health(policy) == word
    monkeypatch.setattr(healths.os, "access", lambda path, mode: path != site_folder.path)
    assert health(policy) == "ledger", "nothing can be made beside it"


def test_both_answer_over_loopback_while_a_round_is_at_work(
    asking: Asking, site_folder: SiteFolder, unused_port: int
) -> None:
    site_folder.write_policy(
        ('ledger = "ledger.sqlite"', f'ledger = "ledger.sqlite"\nmetrics = "127.0.0.1:{unused_port}"')
    )
    desk = Desk(site_folder.settings)
    with shown_metrics(desk), desk._turn:
        assert ask(unused_port, "/health") == (200, "ok\n")
        status, text = ask(unused_port, "/metrics")
        (site_folder.path / "ledger.sqlite").rename(site_folder.path / "away")
        assert ask(unused_port, "/health") == (503, "ledger\n")
    desk.close()
    assert status == 200
    values = {family.name: family.samples for family in text_string_to_metric_families(text)}
    assert values["fedlora_site_at_work"][0].value == 1.0
    assert not any(name.startswith(("process_", "python_")) for name in values), "a batch's size shows in them"


def test_no_other_than_loopback(site_folder: SiteFolder) -> None:
    site_folder.write_policy(('ledger = "ledger.sqlite"', 'ledger = "ledger.sqlite"\nmetrics = "0.0.0.0:9464"'))
    desk = Desk(site_folder.settings)
    with pytest.raises(ConfigError, match=r"site\.metrics = 0\.0\.0\.0:9464, wanted a loopback"), shown_metrics(desk):
        pass
    desk.close()


def ask(port: int, path: str) -> tuple[int, str]:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line.request("GET", path)
    answer = line.getresponse()
    told = answer.status, answer.read().decode()
    line.close()
    return told


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
