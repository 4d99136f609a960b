"""What is published is whole, and names no folder of the machine that made it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import StoreError
from fedlora.experiments.runs.publication import export_runs, without_places
from fedlora.experiments.runs.store import Store
from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.experiments.sweeps.sweep import Sweep

PLACES = (
    "data.source=/home/me/glue",
    "run.out=/home/me/run",
    "model.name=/home/me/minilm",
    "adapter.select=mask",
    "adapter.mask=/home/me/mask.json",
)


def fill(place: Path, make_record: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    record = make_record(*PLACES, value=0.75)
    failed = StoredRun(
        folder="cells/b", digest="b", role="cell", error="no folder /home/me/glue/rte", config=record["config"]
    )
    with Store.create(place) as store:
        store.put(StoredRun(folder="cells/a", digest="a", role="cell", axes={"x": "y"}, record=record), failed)
    (place / "sweep.toml").write_text(
        '[set]\ndata.source = "/home/me/glue"\nadapter.rank = 4\n[grid]\nrun.seed = [0, 1]\n'
    )
    return record


def test_records_are_whole_but_for_places(make_record: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    record, out = fill(tmp_path, make_record), tmp_path / "published"
    assert export_runs(tmp_path, out) == []
    assert b"/home/me" not in (out / "runs.sqlite").read_bytes() + (out / "sweep.toml").read_bytes()
    with Store.open(out, read_only=True) as store:
        done, failed = store.runs()
    assert done.record is not None
    assert {**done.record, "config": None} == {**json.loads(json.dumps(record)), "config": None}
    assert done.record["config"]["data"]["source"] == "PATH_TO_DATA"
    assert (done.axes, done.digest, failed.error) == ({"x": "y"}, "a", "no folder PATH_TO_DATA/rte")
    assert Sweep.from_toml(out / "sweep.toml").base == {"data.source": "PATH_TO_DATA", "adapter.rank": 4}


def test_names_that_are_the_same_everywhere_stay(make_record: Callable[..., dict[str, Any]]) -> None:
    config = make_record("data.source=hub", "model.name=FacebookAI/roberta-large")["config"]
    assert without_places(config) == config


def test_nothing_is_overwritten_and_nothing_comes_of_nothing(
    make_record: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="nothing to export"):
        export_runs(tmp_path / "empty", tmp_path / "out")
    fill(tmp_path, make_record)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty and is left as it is"):
        export_runs(tmp_path, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
