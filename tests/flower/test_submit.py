"""Submitting a run ends as the run ends, whatever Flower's command thinks of it."""

from __future__ import annotations

import json
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from fedlora.config import RunConfig
from server import submit, superlink

Script = Callable[..., Path]


@pytest.fixture
def flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """`flwr(statuses…)` stands for Flower's command: one answer for each look at the run; None is an outage."""

    def make(*statuses: dict[str, Any] | None, taken: bool = True) -> Path:
        answers = tmp_path / "answers"
        answers.mkdir()
        for number, status in enumerate(statuses):
            (answers / f"{number}.json").write_text(json.dumps({"success": True, "runs": [status]}) if status else "")
        run = '{"success": true, "run-id": 7}' if taken else '{"success": false, "error-message": "no such key"}'
        script = tmp_path / "flwr"
        script.write_text(
            f"""#!/bin/sh
if [ "$1" = run ]; then cp "$5" {tmp_path}/sent.toml; echo '{run}'; exit 0; fi
cd {answers}; first=$(ls | sort -n | head -n 1); cat "$first"; [ -s "$first" ]; code=$?; rm "$first"; exit $code
"""
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(superlink, "FLWR", script)
        monkeypatch.setattr(submit, "POLL", 0.01)
        return script

    return make


RUNNING = {"status": "running", "status-details": "N/A"}
DONE = {"status": "finished:completed", "status-details": "N/A"}
FAILED = {"status": "finished:failed", "status-details": "ServerApp failed with exception: round 3: too few"}


def test_a_finished_run_is_a_success(flwr: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flwr(RUNNING, None, RUNNING, DONE)
    assert submit.main(["hospitals", "--out", "/srv/runs/one", "--set", "privacy.epsilon=3"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines() == [
        "run 7: running", "run 7: out of reach", "run 7: running", "run 7: finished:completed",
        "done; the run folder on the SuperLink's host: /srv/runs/one",
    ]  # fmt: skip
    sent = tomllib.loads((tmp_path / "sent.toml").read_text())
    flat = {f"{section}.{key}": value for section, table in sent.items() for key, value in table.items()}
    config = RunConfig.from_flower(flat)
    assert (config.privacy.epsilon, config.run.out) == (3.0, "/srv/runs/one")


@pytest.mark.parametrize("end", [FAILED, {"status": "finished:stopped", "status-details": ""}])
def test_a_run_that_did_not_complete_is_a_failure(
    flwr: Script, end: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    flwr(RUNNING, end)
    assert submit.main(["hospitals", "--out", "/srv/runs/one"]) == 1
    said = capsys.readouterr().err
    assert end["status"] in said
    assert end["status-details"] in said
    assert len(said.splitlines()) == 1


def test_a_run_that_is_not_taken_is_a_failure(flwr: Script, capsys: pytest.CaptureFixture[str]) -> None:
    flwr(taken=False)
    assert submit.main(["hospitals", "--out", "/srv/runs/one"]) == 1
    assert "flwr run failed: no such key" in capsys.readouterr().err


def test_a_superlink_that_stays_away_is_a_failure(
    flwr: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flwr(RUNNING, *[None] * 50)
    monkeypatch.setattr(submit, "OUTAGE", 0.0)
    assert submit.main(["hospitals", "--out", "/srv/runs/one"]) == 1
    assert "flwr ls failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--out", "runs/one"], "wanted an absolute path"),
        (["--out", "/srv/one", "--set", "privacy.epsilonn=3"], "privacy.epsilon"),
        (["nothing.toml", "--out", "/srv/one"], "cannot read"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    flwr: Script, tmp_path: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flwr()
    assert submit.main(["hospitals", *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "sent.toml").exists()
