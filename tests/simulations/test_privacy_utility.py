"""The README's table comes from records alone, and a cell that is there is not run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simulations import privacy_utility
from simulations.privacy_utility import record_file, run_cell, table

RECIPE = Path("anywhere/sst2.toml")


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(privacy_utility, "RESULTS", tmp_path)
    return tmp_path


def write(epsilon: str, seed: int, value: float, *spent: float | str, sigma: float = 0.5) -> None:
    clients = [{"epsilon": one, "effective_noise_multiplier": sigma} for one in spent]
    path = record_file(RECIPE, epsilon, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metric": {"value": value}, "bytes_up": 1_500_000, "clients": clients}))


def rows(*epsilons: str) -> list[list[str]]:
    lines = table(RECIPE, [*epsilons]).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_row_is_mean_and_spread_over_seeds_and_the_worst_site() -> None:
    write("6", 0, 0.80, 5.9, 5.99)
    write("6", 1, 0.90, 5.8, 5.95, sigma=0.6)
    assert rows("6") == [["6", "0.850 ± 0.071", "2", "0.600", "5.990", "1.5 MB"]]


def test_no_privacy_is_written_as_infinity() -> None:
    write("inf", 0, 0.9, "inf", sigma=0.0)
    assert rows("inf") == [["∞", "0.900 ± 0.000", "1", "0.000", "∞", "1.5 MB"]]


def test_rows_follow_the_order_asked_for_and_missing_ones_are_left_out() -> None:
    write("1", 0, 0.7, 0.99)
    write("10", 0, 0.9, 9.99)
    assert [row[0] for row in rows("10", "3", "1")] == ["10", "1"]


def test_a_cell_that_is_there_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    write("6", 0, 0.8, 5.9)
    monkeypatch.setattr(privacy_utility.subprocess, "run", lambda *_, **__: pytest.fail("ran"))
    run_cell(RECIPE, "6", 0, [], 1)


PLACES = {"data": {"source": "/home/me/glue", "task": "sst2"}, "run": {"out": "/home/me/run", "seed": 7}}


def test_a_cell_is_one_run_of_which_the_record_stays(monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        asked.append(command)
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        (folder / "record.json").write_text(json.dumps({"config": PLACES, "metric": 1}))

    monkeypatch.setattr(privacy_utility.subprocess, "run", run)
    run_cell(RECIPE, "3", 7, ["data.source=there"], 1)
    assert [path for path in results.rglob("*") if path.is_file()] == [record_file(RECIPE, "3", 7)]
    kept = json.loads(record_file(RECIPE, "3", 7).read_text())
    assert "/home/me" not in str(kept), "a record that is published names no folder of this machine"
    assert (kept["metric"], kept["config"]["data"]["task"], kept["config"]["run"]["seed"]) == (1, "sst2", 7)
    settings = [word for word, before in zip(asked[0][1:], asked[0], strict=False) if before == "--set"]
    assert settings == ["privacy.epsilon=3", "run.seed=7", "data.source=there"]
