"""Every run of a folder is found, once, and what is wrong with one hides no other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedlora.errors import StoreError
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.runs import gathering
from fedlora.experiments.runs.gathering import gather, stored_run
from fedlora.experiments.runs.store import FILE_NAME, Store
from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.experiments.sweeps.sweep import Sweep

MakeRun = Callable[..., Path]


def statuses(place: Path) -> dict[str, str]:
    with gather(place).store as store:
        return {row["folder"]: row["status"] for row in store.select()}


def test_finished_runs_are_kept_and_others_only_listed(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "b")
    make_run(tmp_path / "a", finished=False)
    (tmp_path / "notes").mkdir()
    make_run(tmp_path / ".removed-c")
    assert statuses(tmp_path) == {"a": "unfinished", "b": "done"}
    with Store.open(tmp_path) as store:
        assert [run.folder for run in store.runs()] == ["b"]
    RunFolder(tmp_path / "a").write_record(stored_run(tmp_path / "b", relative_to=tmp_path).record or {})
    assert statuses(tmp_path) == {"a": "done", "b": "done"}


def test_nothing_is_made_where_nothing_is_found(tmp_path: Path) -> None:
    assert statuses(tmp_path) == {}
    assert [*tmp_path.iterdir()] == []


def test_a_finished_run_as_a_store_keeps_it(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path / "cells" / "a", value=0.75)
    run = stored_run(folder, relative_to=tmp_path, role="cell", axes={"task": "sst2"}, digest="asked")
    assert (run.folder, run.role, run.axes, run.digest, run.status) == (
        "cells/a",
        "cell",
        {"task": "sst2"},
        "asked",
        "done",
    )
    assert [line["round"] for line in run.rounds] == [0, 1]
    assert run.record == json.loads((folder / "record.json").read_text())
    assert stored_run(folder, relative_to=tmp_path).digest == run.record["config_digest"]


def test_an_unfinished_run_shows_what_it_has_spent_so_far(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "a", "data.task=rte", finished=False)
    with gather(tmp_path).store as store:
        (row,) = store.select()
    assert (row["task"], row["rounds_done"], row["epsilon_spent"], row["wall_seconds"]) == ("rte", 2, 2.00001, 3.0)


def test_a_record_that_changed_is_read_again_and_no_other(
    tmp_path: Path, make_run: MakeRun, make_record: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        make_run(tmp_path / name)
    gather(tmp_path).store.close()
    read: list[str] = []
    look = gathering.stored_run

    def watched(folder: Path, **how: Any) -> StoredRun:
        read.append(folder.name)
        return look(folder, **how)

    monkeypatch.setattr(gathering, "stored_run", watched)
    assert statuses(tmp_path) == {"a": "done", "b": "done"}
    assert read == []
    RunFolder(tmp_path / "b").write_record(make_record(value=0.125))
    with gather(tmp_path).store as store:
        assert [row["value"] for row in store.select()] == [0.8, 0.125]
    assert read == ["b"]


def test_a_sweep_is_found_with_its_labels_also_without_its_store(tmp_path: Path, make_run: MakeRun) -> None:
    (tmp_path / "asked.toml").write_text("[grid]\nprivacy.epsilon = [inf, 3.0]\ndata.task = ['rte']\n")
    sweep = Sweep.from_toml(tmp_path / "asked.toml")
    root = tmp_path / "sweep"
    root.mkdir()
    (root / "sweep.toml").write_text(tomli_w.dumps(sweep.to_mapping()))
    for cell in sweep.cells():
        make_run(
            root / cell.folder, f"privacy.epsilon={cell.config.privacy.epsilon}", "data.task=rte", "run.device=cpu"
        )
    make_run(root / "trials" / "0123456789abcdef", "run.seed=7")
    with gather(root).store as store:
        found = {run.folder: (run.role, run.axes, run.digest) for run in store.runs()}
    assert {cell.folder: ("cell", cell.axes, cell.digest) for cell in sweep.cells()}.items() <= found.items()
    assert found["trials/0123456789abcdef"][0] == "trial"
    assert len(found) == 3


def test_what_the_sweep_said_of_a_cell_stays(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "cells" / "a", finished=False)
    make_run(tmp_path / "cells" / "b")
    with Store.create(tmp_path) as store:
        for name in "ab":
            labels = {"method": f"method {name}"}
            store.put(StoredRun(folder=f"cells/{name}", digest=name, role="cell", axes=labels, error="no records"))
    with gather(tmp_path).store as store:
        failed, done = store.runs()
    assert (failed.status, failed.error, failed.axes) == ("failed", "no records", {"method": "method a"})
    assert (done.status, done.error, done.axes, done.digest) == ("done", "", {"method": "method b"}, "b")


def test_finished_work_stays_when_its_folder_is_gone_or_damaged(tmp_path: Path, make_run: MakeRun) -> None:
    for name in "abc":
        make_run(tmp_path / name)
    gather(tmp_path).store.close()
    (tmp_path / "a").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    (tmp_path / "b" / "record.json").write_text("{")
    (tmp_path / "c" / "record.json").unlink()
    with (gathered := gather(tmp_path)).store as store:
        assert [run.status for run in store.runs()] == ["done"] * 3
    assert len(gathered.complaints) == 1
    assert str(tmp_path / "b" / "record.json") in gathered.complaints[0]


BAD_RECORDS: dict[str, tuple[Any, str]] = {
    "cut off": ('{"schema_version": 1, "conf', "damaged"),
    "empty": ("", "damaged"),
    "a list": ("[]", "damaged"),
    "not text": (b"\xff\xfe\x00", "damaged"),
    "newer": ({"schema_version": 2}, "schema 2, this fedlora reads up to 1"),
    "no config": ({"config": None}, "damaged"),
    "no task": ({"config": {"data": {}}}, "it has no 'task'"),
    "no value": ({"metric": {"name": "accuracy", "value": None}}, "metric.value is null"),
    "no clients": ({"clients": []}, None),
    "clients that are none": ({"clients": [3]}, "damaged"),
    "no epsilon": ({"clients": [{"epsilon": "many"}]}, "damaged"),
    "epsilon is NaN": ({"clients": [{"epsilon": "nan"}]}, "ε is not a number"),
    "privacy of another kind": ({"privacy": []}, "damaged"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_one_line_and_hides_no_other(tmp_path: Path, make_run: MakeRun, case: str) -> None:
    content, words = BAD_RECORDS[case]
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    file = tmp_path / "a" / "record.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with (gathered := gather(tmp_path)).store as store:
        listed = [run.folder for run in store.runs()]
    if words is None:
        assert (listed, gathered.complaints) == (["a", "b"], [])
        return
    (complaint,) = gathered.complaints
    assert listed == ["b"]
    assert words in complaint
    assert str(file) in complaint
    assert "\n" not in complaint


@pytest.mark.parametrize(("name", "content"), [("config.toml", "["), ("rounds.jsonl", b"\xff\xfe")])
def test_a_damaged_unfinished_run_is_one_line(tmp_path: Path, make_run: MakeRun, name: str, content: Any) -> None:
    make_run(tmp_path / "a", finished=False)
    make_run(tmp_path / "b")
    (tmp_path / "a" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with (gathered := gather(tmp_path)).store as store:
        assert [run.folder for run in store.runs()] == ["b"]
    (complaint,) = gathered.complaints
    assert str(tmp_path / "a") in complaint


def test_a_store_that_cannot_be_written_is_no_hindrance(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "a")

    def full(*_: Any, **__: Any) -> None:
        raise StoreError("cannot use the store: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", full)
        with (gathered := gather(tmp_path)).store as store:
            assert len(store.runs()) == 1
        assert gathered.complaints == [
            "cannot use the store: the disk is full (runs that it lacks are shown all the same)"
        ]
    monkeypatch.setattr(os, "access", lambda *_: False)
    with (gathered := gather(tmp_path)).store as store:
        assert len(store.runs()) == 1
    assert gathered.complaints == []
    assert not (tmp_path / FILE_NAME).exists()


def test_a_store_lies_by_itself_where_it_is_published(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "a")
    gather(tmp_path).store.close()
    published = tmp_path.parent / f"{tmp_path.name}.sqlite"
    (tmp_path / FILE_NAME).rename(published)
    assert statuses(published) == {"a": "done"}


def test_what_is_no_folder_of_runs_is_said(tmp_path: Path, make_run: MakeRun) -> None:
    single = make_run(tmp_path / "a")
    with pytest.raises(StoreError, match=f"is the folder of one run; give the folder that it lies in, {tmp_path}"):
        gather(single)
    for place, words in (
        (tmp_path / "missing", "is not there; give a folder of runs"),
        (tmp_path / "\0", "is not there"),
        (tmp_path / ("x" * 300), "cannot read"),
        (single / "config.toml", "another program's file"),
        (single / "config.toml" / "below", "is not there|cannot read"),
    ):
        with pytest.raises(StoreError, match=words):
            gather(place)


def test_a_run_goes_by_its_folder_or_how_that_or_its_digest_begins(tmp_path: Path, make_run: MakeRun) -> None:
    for name in ("sst2-ffa", "sst2-ffa-2", "cells/0123", "cells/0199", "trials/77"):
        make_run(tmp_path / name, f"run.seed={len(name)}{name[-1]}" if name[-1].isdigit() else "run.seed=1")
    with (gathered := gather(tmp_path)).store as store:
        digests = {run.folder: run.digest for run in store.runs()}
        found = {word: gathered.find(word).folder for word in ("sst2-ffa", "sst2-ffa-", "012", "cells/0123/", "7")}
        assert found == {
            "sst2-ffa": "sst2-ffa",
            "sst2-ffa-": "sst2-ffa-2",
            "012": "cells/0123",
            "cells/0123/": "cells/0123",
            "7": "trials/77",
        }
        assert gathered.find(digests["cells/0199"][:20]).folder == "cells/0199"
        with pytest.raises(StoreError, match="'01' could be cells/0123, cells/0199; give more of its name"):
            gathered.find("01")
        with pytest.raises(StoreError, match=r"no run 'nope' in .*; `fedlora runs list .*` names them"):
            gathered.find("nope")


def test_rounds_of_a_finished_run_that_cannot_be_read_are_named(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path / "one")
    rounds = folder / "rounds.jsonl"
    rounds.write_text('{"round": 0}\nx{\n{"round": 2}\n')
    gathered = gather(tmp_path)
    assert [complaint.partition(" and ")[0] for complaint in gathered.complaints] == [f"{rounds} is damaged in line 2"]
    assert gathered.store.select() == []
    gathered.store.close()
