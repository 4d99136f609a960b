"""The benchmarks of deployments run, in small, and what they write adds up. No test looks at how long anything took."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from benchmarks import deployed_load, deployed_round
from benchmarks.deployed.contest import FEDLORA, FEDLORA_SECOND, FLOOR_AWAKE, FLOOR_POLLING, FLOOR_STRATEGY, QUICKSTART
from benchmarks.deployed.timeline import flower_rounds

pytestmark = [pytest.mark.slow, pytest.mark.flower]


def measured(
    main: Callable[[], None], name: str, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> tuple[dict[str, Any], str]:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(out), *options])
    main()
    return json.loads((out / f"{name}.json").read_text()), (out / f"{name}.md").read_text()


def test_a_round_is_the_sum_of_its_parts_and_everyone_does_all_of_them(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_model("bert"))
    without = ["--without", FEDLORA_SECOND, FLOOR_STRATEGY, FLOOR_POLLING, FLOOR_AWAKE]
    options = ["--model", model, "--blocks", "1", "--rounds", "2", *without]
    facts, markdown = measured(deployed_round.main, "deployed_round", tmp_path, monkeypatch, *options)
    assert facts["ways"].keys() == {FEDLORA, QUICKSTART}
    assert [len(way["rounds"]) for way in facts["ways"].values()] == [2, 2]
    whole = [one for one in facts["ways"][FEDLORA]["rounds"] if "server" in one]
    assert whole, "no answer was seen on the server's disk"
    for one in whole:
        parts = [one[part] for part in ("waiting", "starting", "daemon", "training", "returning", "server")]
        assert sum(parts) == pytest.approx(one["round"], abs=1e-3)
        assert one["overhead"] == pytest.approx(one["round"] - one["longest_training"], abs=1e-3)
        assert min(parts) > -0.02, "clocks of processes and files differ by hundredths"
        assert one["longest_training"] >= one["training"] > 0
    assert all(one["longest_training"] > 0 for one in facts["ways"][QUICKSTART]["rounds"])
    assert str(tmp_path) not in markdown


def test_fifty_sites_in_small(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--model", str(tiny_model("bert")), "--sites", "3", "--rounds", "4"]
    facts, markdown = measured(deployed_load.main, "deployed_load", tmp_path, monkeypatch, *options)
    assert [line["clients_ok"] for line in facts["rounds"]] == [3] * 4
    assert len(facts["sizes"]) == 4
    assert all(value > 0 for sizes in facts["sizes"] for value in sizes.values())
    assert "all rounds together: 0." in markdown


def test_the_slope_is_that_of_the_line() -> None:
    assert deployed_load.slope([5.0, 7.0, 9.0, 11.0]) == pytest.approx(2.0)


def test_training_is_taken_off_once_and_where_it_was_longest() -> None:
    site = {"process_started": 1.0, "imported": 3.0, "called": 3.0, "began": 4.0, "ended": 5.0}
    (first,) = flower_rounds([0.0, 10.0], [[site], [site | {"ended": 6.5}]])
    assert first["longest_training"] == 2.5
    assert first["overhead"] == 7.5
    assert first["returning"] == 3.5
