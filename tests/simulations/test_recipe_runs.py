"""A run of a recipe leaves its record, and one that is there is not run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from simulations import recipe_runs
from simulations.recipe_runs import run_recipe

RECIPE = Path("anywhere/sst2.toml")


def test_a_record_that_is_there_is_not_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("{}")
    monkeypatch.setattr(recipe_runs.subprocess, "run", lambda *_, **__: pytest.fail("ran"))
    run_recipe(RECIPE, tmp_path / "there.json", [], 1)


def test_a_run_leaves_its_record_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []
    config = RunConfig().with_overrides("data.source=/home/me/glue", "run.out=/home/me/run", "run.seed=7")

    def run(command: list[str], **_: Any) -> None:
        asked.append(command)
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        (folder / "record.json").write_text(json.dumps({"config": config.to_mapping(), "metric": 1}))

    monkeypatch.setattr(recipe_runs.subprocess, "run", run)
    record = tmp_path / "deep" / "one.json"
    run_recipe(RECIPE, record, ["privacy.epsilon=3", "data.source=there"], 1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [record]
    kept = json.loads(record.read_text())
    assert "/home/me" not in str(kept), "a record that is published names no folder of this machine"
    assert (kept["metric"], kept["config"]["data"]["task"], kept["config"]["run"]["seed"]) == (1, "sst2", 7)
    settings = [word for word, before in zip(asked[0][1:], asked[0], strict=False) if before == "--set"]
    assert settings == ["privacy.epsilon=3", "data.source=there"]
