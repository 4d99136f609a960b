"""The store keeps what it was given, whole or not at all, and says in one line what it cannot use."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import ConfigError, StoreError
from fedlora.experiments.runs import store as store_module
from fedlora.experiments.runs.store import COLUMNS, FILE_NAME, SCHEMA_VERSION, Store
from fedlora.experiments.runs.stored_run import StoredRun

MakeRecord = Callable[..., dict[str, Any]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path) as made:
        yield made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / FILE_NAME


def run(folder: str, record: dict[str, Any] | None = None, **facts: Any) -> StoredRun:
    return StoredRun(folder=folder, digest=f"digest of {folder}", record=record, **facts)


def test_what_was_put_comes_back_in_another_process_as_it_was(store: Store, make_record: MakeRecord) -> None:
    record = make_record("privacy.epsilon=inf") | {"odd": "\udcff", "sites": ["ε", None, 1e-300]}
    kept = [
        run("a", record, rounds=[{"round": 0, "epsilon_max": "inf"}], axes={"b": "2", "a": "1"}, stamp="7-8"),
        run("cells/b", role="cell", error="no records", config=make_record()["config"], rounds=[]),
    ]
    store.put(*kept)
    with Store.open(store.path.parent, read_only=True) as again:
        assert again.runs() == kept
        assert again.get("cells/b") == kept[1]
        assert again.stamps() == {"a": "7-8", "cells/b": ""}
        assert list(again.runs()[0].axes) == ["b", "a"], "axes keep their order"


def test_infinite_settings_of_a_run_without_record_are_text_as_in_json(store: Store) -> None:
    store.put(run("a", error="x", config={"privacy": {"epsilon": math.inf}}))
    assert store.get("a").settings == {"privacy": {"epsilon": "inf"}}
    assert store.select("epsilon = 9e999 AND config ->> '$.privacy.epsilon' = 'inf'")


def test_columns_say_what_was_asked_reached_and_spent(store: Store, make_record: MakeRecord) -> None:
    store.put(run("a", make_record("run.seed=4", "data.task=rte", value=0.625), rounds=[{}, {}]))
    (row,) = store.select()
    assert row == {
        "folder": "a",
        "digest": "digest of a",
        "role": "run",
        "axes": {},
        "status": "done",
        "error": "",
        "task": "rte",
        "method": "ffa",
        "epsilon": 6.0,
        "seed": 4,
        "epsilon_spent": 5.9996,
        "private": 1,
        "metric": "accuracy",
        "metric_of": None,
        "value": 0.625,
        "rounds_done": 2,
        "wall_seconds": 75.25,
        "started": "2026-11-22T02:58:44+0000",
    }
    assert tuple(row) == COLUMNS


def test_whose_model_a_figure_is_of_is_a_column_like_any_other(store: Store, make_record: MakeRecord) -> None:
    for name, of in (("a", "own"), ("b", "global"), ("c", "own")):
        record = make_record()
        store.put(run(name, record | {"metric": record["metric"] | {"of": of}}))
    store.put(run("d"))
    assert [row["metric_of"] for row in store.select(order="metric_of")] == ["global", "own", "own", None]
    assert [row["folder"] for row in store.select("metric_of = 'own'", equal={"metric_of": "own"})] == ["a", "c"]


@pytest.mark.parametrize(
    ("change", "spent"),
    [
        ({}, 5.9996),
        ({"privacy": {"guarantee": {"epsilon": "inf"}}}, math.inf),
        ({"privacy": {"guarantee": {"epsilon": 5.9996}, "sites": [{"epsilon_charged": 6.75}, {}]}}, 6.75),
        ({"privacy": {}}, 5.9996),
        ({"clients": [{"epsilon": 1.0}, {"epsilon": 2.5}], "privacy": {}}, 2.5),
    ],
    ids=["as stated", "unsound", "rounds done anew", "an old record", "the worst site"],
)
def test_spent_is_the_most_that_any_site_was_charged(make_record: MakeRecord, change: Any, spent: float) -> None:
    assert run("a", make_record() | change).epsilon_spent == spent


def test_a_promise_is_not_kept_by_seeded_noise_or_none(make_record: MakeRecord) -> None:
    records = [make_record(*how) for how in ((), ("privacy.seeded_noise=true",), ("privacy.epsilon=inf",))]
    assert [run("a", record).private for record in records] == [True, False, False]
    assert run("a").private is None


def test_a_run_that_did_not_end_has_spent_what_its_rounds_did(store: Store) -> None:
    rounds = [{"epsilon_max": 1.5, "seconds": 2.0}, {"epsilon_max": 2.5, "seconds": 3.0}]
    store.put(run("a", rounds=rounds), run("b", rounds=rounds, error="no records"), run("c"))
    columns = ("status", "epsilon_spent", "rounds_done", "wall_seconds", "value")
    assert [tuple(row[name] for name in columns) for row in store.select()] == [
        ("unfinished", 2.5, 2, 5.0, None),
        ("failed", 2.5, 2, 5.0, None),
        ("unfinished", None, 0, None, None),
    ]


def test_a_run_is_kept_once_and_can_be_forgotten(store: Store, make_record: MakeRecord) -> None:
    store.put(run("a", error="no records"))
    store.put(run("a", make_record(value=0.5)), run("b", make_record()))
    assert [(row["status"], row["value"]) for row in store.select()] == [("done", 0.5), ("done", 0.8)]
    store.remove("a")
    store.remove("never there")
    assert [kept.folder for kept in store.runs()] == ["b"]


def test_labels_of_a_sweep_outlive_a_second_look_at_the_folder(store: Store, make_record: MakeRecord) -> None:
    store.put(run("a", error="no records", role="cell", axes={"task": "sst2"}))
    store.put(StoredRun(folder="a", digest="other", record=make_record(value=0.5)), keep_labels=True)
    (kept,) = store.runs()
    assert (kept.role, kept.axes, kept.digest, kept.status) == ("cell", {"task": "sst2"}, "digest of a", "done")


def test_several_are_kept_together_or_not_at_all(store: Store, make_record: MakeRecord) -> None:
    store.put(run("a", make_record(value=0.25)))
    with pytest.raises(StoreError, match="surrogates not allowed"):
        store.put(run("a", make_record(value=0.5)), run("b\udcff", make_record()))
    assert [row["value"] for row in store.select()] == [0.25]


def test_conditions_and_orders_choose_rows(store: Store, make_record: MakeRecord) -> None:
    for name, value, task in (("a", 0.5, "rte"), ("b", 0.75, "sst2"), ("c", 0.25, "rte")):
        store.put(run(name, make_record(f"data.task={task}", value=value)))
    store.put(run("d", error="no records"))

    def found(where: str = "TRUE", **how: Any) -> str:
        return "".join(row["folder"] for row in store.select(where, **how))

    assert found("value > 0.3 -- not too small") == "ab"
    assert found("value > 0.3 OR TRUE", equal={"task": "rte"}) == "ac", "a condition cannot undo another"
    assert found("record ->> '$.config.federation.clients' = 3 AND task = 'sst2'") == "b"
    assert found(order="value") == "cabd"
    assert found(order="value", descending=True) == "bacd", "no value comes last"


@pytest.mark.parametrize(
    "where",
    [
        "valu > 3",
        "value >",
        "TRUE); DELETE FROM runs; --",
        "TRUE) UNION SELECT 1 --",
        "folder IN (SELECT load_extension('x'))",
        "value = :unbound",
        "(SELECT 1 FROM nowhere)",
        "",
    ],
)
def test_a_condition_that_is_none_names_itself_and_changes_nothing(
    store: Store, make_record: MakeRecord, where: str
) -> None:
    store.put(run("a", make_record()))
    with pytest.raises(ConfigError) as refused:
        store.select(where)
    assert repr(where) in str(refused.value)
    assert "epsilon_spent" in str(refused.value), "names what there is"
    assert len(store.runs()) == 1
    store.remove("a")  # the store is as usable as before


def test_conditions_cannot_write_attach_or_set(store: Store, tmp_path: Path) -> None:
    store.put(run("a"))
    for statement in (f"ATTACH '{tmp_path}/x' AS x", "PRAGMA user_version = 9", "DELETE FROM runs"):
        with pytest.raises(ConfigError):
            store.select(f"TRUE); {statement}; --")
        with pytest.raises(ConfigError):
            store.select(f"({statement})")
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_copy_in_memory_changes_nothing_on_disk(store: Store, file: Path, make_record: MakeRecord) -> None:
    store.put(run("a", make_record()))
    before = file.read_bytes()
    with Store.copy(file) as copy:
        copy.put(run("b", make_record()))
        assert [kept.folder for kept in copy.runs()] == ["a", "b"]
    assert file.read_bytes() == before
    with Store.copy(file.with_name("none.sqlite")) as empty:
        assert empty.runs() == []
    assert not file.with_name("none.sqlite").exists()


def test_a_kill_while_a_store_was_made_leaves_one_that_is_made_still(file: Path) -> None:
    file.touch()  # what is there before the first transaction ends
    with Store.copy(file) as copy:
        assert copy.runs() == []
    with Store.create(file.parent) as store:
        store.put(run("a"))
    with Store.create(file.parent) as store:
        assert len(store.runs()) == 1


def _damage(file: Path, how: str) -> None:
    whole = file.read_bytes()
    contents = {
        "truncated": whole[: len(whole) // 2],
        "text": b"this is no database, but some text that is long enough to be looked at as one" * 20,
        "overwritten": whole[:4096] + b"\xff" * (len(whole) - 4096),
    }
    if how in contents:
        file.write_bytes(contents[how])
        return
    with closing(sqlite3.connect(file)) as connection:
        statements = {
            "another program's": "PRAGMA application_id = 0",
            "newer": f"PRAGMA user_version = {SCHEMA_VERSION + 1}",
            "altered JSON": "UPDATE runs SET axes = '{' WHERE folder = 'a'",
            "other columns": "ALTER TABLE runs DROP COLUMN stamp",
        }
        connection.execute(statements[how])
        connection.commit()


WORDS = {
    "truncated": "damaged|malformed",
    "text": "another program's file",
    "overwritten": "damaged|malformed",
    "another program's": "is not a store of runs",
    "newer": f"has schema {SCHEMA_VERSION + 1}, this fedlora reads up to {SCHEMA_VERSION}",
    "altered JSON": "cannot use the store of runs",
    "other columns": "no such column",
}


@pytest.mark.parametrize("how", WORDS)
def test_what_is_no_store_is_one_line_and_stays_as_it_is(file: Path, make_record: MakeRecord, how: str) -> None:
    with Store.create(file.parent) as store:
        store.put(*(run(name, make_record()) for name in "abcdefgh"))
    _damage(file, how)
    before = file.read_bytes()
    for look in (
        lambda: Store.copy(file).runs(),
        lambda: Store.open(file, read_only=True).runs(),
        lambda: Store.create(file.parent).runs(),
    ):
        with pytest.raises(StoreError, match=WORDS[how]) as refused:
            look()
        assert str(file) in str(refused.value)
        assert "\n" not in str(refused.value)
    assert file.read_bytes() == before


def test_no_store_is_said_and_none_is_made(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StoreError, match="is not there; give a folder of runs"):
            Store.open(path)
    with pytest.raises(StoreError, match="see that the folder is there"):
        Store.create(tmp_path / "missing")
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_keeps_what_was_there(store: Store, file: Path, make_record: MakeRecord) -> None:
    """SQLite's own limit on pages fails as a full disk does, with the same code at the same place."""
    store.put(run("a", make_record(value=0.25)))
    with closing(sqlite3.connect(file)) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="full; free some space and run it again"):
        store.put(run("a", make_record(value=0.5)), *(run(f"b{number}", make_record()) for number in range(50)))
    store._connection.execute("PRAGMA max_page_count = 1000000")
    assert [row["value"] for row in store.select()] == [0.25]
    store.put(run("b", make_record()))
    assert len(store.runs()) == 2


def test_a_store_that_another_process_changes_is_waited_for_and_then_said(
    store: Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "WAIT_SECONDS", 0.05)
    with closing(sqlite3.connect(file, isolation_level=None)) as other, Store.open(file) as late:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="another process is at work on it; run it again"):
            late.put(run("a"))
        other.execute("COMMIT")
        late.put(run("a"))


def test_a_store_that_may_only_be_read_refuses_a_change(store: Store, file: Path) -> None:
    with Store.open(file, read_only=True) as only, pytest.raises(StoreError, match="see that you may write there"):
        only.put(run("a"))


def _put_until_killed(folder: Path, made: Any) -> None:
    with Store.create(folder) as store:
        for number in range(100_000):
            record = {"padding": "x" * 20_000, "schema_version": 1, "config": {}, "clients": [], "wall_seconds": 1}
            record["privacy"] = {"guarantee": {"epsilon": 1.0}}
            store.put(run(f"{number:06}", record))
            made.put(number)


def test_every_put_that_returned_outlives_a_kill(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    made = context.Queue()
    process = context.Process(target=_put_until_killed, args=(tmp_path, made))
    process.start()
    for _ in range(20):
        last = made.get(timeout=60)
    os.kill(process.pid or 0, 9)
    process.join()
    with Store.create(tmp_path) as store:
        folders = [kept.folder for kept in store.runs()]
    assert folders == [f"{number:06}" for number in range(len(folders))]
    assert len(folders) > last


def test_records_that_were_really_made_fit(tmp_path: Path) -> None:
    """Those published here, old ones among them."""
    results = Path(__file__).parents[3] / "simulations" / "results"
    records = {path: json.loads(path.read_text()) for path in results.glob("*/*.json")}
    records = {path: record for path, record in records.items() if "config" in record}
    assert records
    with Store.create(tmp_path) as store:
        store.put(*(run(path.stem + path.parent.name, record) for path, record in records.items()))
        for row in store.select():
            assert None not in (row["task"], row["method"], row["epsilon"], row["epsilon_spent"], row["value"])


def test_labels_of_a_sweep_are_names_of_tasks_and_methods_too(tmp_path: Path, make_record: MakeRecord) -> None:
    with Store.create(tmp_path) as store:
        for name, label in (("a", "all modules"), ("b", 'größe "x"'), ("c", "ffa")):
            store.put(run(name, make_record(), axes={"method": label, "seed": "0"}))
        found = {label: store.select(equal={"method": label}) for label in ("all modules", 'größe "x"', "modules", "0")}
        assert [[row["folder"] for row in rows] for rows in found.values()] == [["a"], ["b"], [], ["a", "b", "c"]]
        assert len(store.select(equal={"method": "ffa"})) == 3
