"""runs.sqlite: the records of many runs in one file beside their folders, to be listed, compared and reported.

A run's own folder stays the truth while it is there: the store is filled from it, and can be made again. Where only the
store is kept, as for results that are published, it holds everything that tables and figures are made of.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from fedlora.errors import ConfigError, StoreError
from fedlora.experiments.run_folder import to_json
from fedlora.experiments.runs.stored_run import StoredRun

FILE_NAME = "runs.sqlite"
SCHEMA_VERSION = 1
WAIT_SECONDS = 30.0
"""For another process to end its change of the store."""

_APPLICATION = 0x6665646C  # "fedl": another program's database is not taken for a store
_TABLE = """
CREATE TABLE runs (
    folder TEXT PRIMARY KEY,   -- of the run, relative to the store's own
    digest TEXT NOT NULL,      -- of the config that was asked for
    role TEXT NOT NULL,        -- cell | trial | run
    axes TEXT NOT NULL,        -- JSON: the sweep's axes, and this run's label on each
    status TEXT NOT NULL,      -- done | failed | unfinished
    error TEXT NOT NULL,       -- one line; empty where it has not failed
    task TEXT, method TEXT, epsilon REAL, seed INTEGER,            -- as asked
    epsilon_spent REAL, private INTEGER,                           -- 0: it promises nothing
    metric TEXT, value REAL, rounds_done INTEGER, wall_seconds REAL, started TEXT,
    stamp TEXT NOT NULL,       -- of record.json when it was read
    config TEXT,               -- JSON, where there is no record
    record TEXT,               -- record.json, whole
    rounds TEXT                -- JSON list of the lines of rounds.jsonl
) STRICT
"""
COLUMNS = (
    *("folder", "digest", "role", "axes", "status", "error", "task", "method", "epsilon", "seed"),
    *("epsilon_spent", "private", "metric", "metric_of", "value", "rounds_done", "wall_seconds", "started"),
)
"""What `Store.select` gives of each run."""
_SEEN = "(SELECT *, record ->> '$.metric.of' AS metric_of FROM runs)"  # whose model it is; not in old records
_WHOLE = "SELECT folder, digest, role, axes, error, record, rounds, config, stamp FROM runs"
_NAMED_BY_SWEEPS = ("task", "method")
_LABELS = ("folder", "digest", "role", "axes")  # what a run is called; the rest is what it did
_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_ADVICE = {
    sqlite3.SQLITE_FULL: "free some space and run it again",
    sqlite3.SQLITE_BUSY: "another process is at work on it; run it again when that is done",
    sqlite3.SQLITE_READONLY: "see that you may write there",
    sqlite3.SQLITE_CANTOPEN: "see that the folder is there and you may write to it",
    sqlite3.SQLITE_NOTADB: "it is another program's file, or damaged; move it away, and run folders make it anew",
    sqlite3.SQLITE_CORRUPT: "it is damaged; move it away, and run folders make it anew",
}


class Store:
    """An open store. Every change is on disk when the call returns."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """Use `open`, `create` or `copy`."""
        self.path, self._connection = path, connection

    @classmethod
    def create(cls, folder: Path) -> Self:
        """The store in `folder`, made where there is none.

        Raises:
            StoreError: it cannot be made, or what is there is not a store of this version.
        """
        return cls._checked(folder / FILE_NAME, "rwc")

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Self:
        """The store at `path`: its file, or the folder that it lies in.

        Raises:
            StoreError: there is none, it is something else, or of a newer version.
        """
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise StoreError(f"{path} is not there; give a folder of runs or a sweep's, or run `fedlora sweep` first")
        return cls._checked(path, "ro" if read_only else "rw")

    @classmethod
    def copy(cls, path: Path) -> Self:
        """A copy in memory of the store at `path`, or a new one where none is; what is done to it stays there.

        Raises:
            StoreError: what is there is not a store of this version.
        """
        store = cls(path, sqlite3.connect(":memory:", isolation_level=None))
        try:
            if path.is_file() and path.stat().st_size:
                with cls.open(path, read_only=True) as kept, _said(path):
                    kept._connection.backup(store._connection)
            else:
                store._make()
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def _checked(cls, path: Path, mode: str) -> Self:
        with _said(path):
            address = f"{path.absolute().as_uri()}?mode={mode}"
            store = cls(path, sqlite3.connect(address, uri=True, timeout=WAIT_SECONDS, isolation_level=None))
        try:
            if mode == "rwc":
                store._make()
            store._check_version()
        except BaseException:
            store.close()
            raise
        return store

    def _make(self) -> None:
        """The table, in a file that has nothing yet; a kill leaves all of it or an empty file."""
        with _said(self.path):
            if self._connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone() != (0,):
                return
        with self._change():
            self._connection.execute(_TABLE.replace("TABLE", "TABLE IF NOT EXISTS", 1))  # where two began at once
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _check_version(self) -> None:
        with _said(self.path):
            (application,) = self._connection.execute("PRAGMA application_id").fetchone()
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION:
            raise StoreError(f"{self.path} is not a store of runs; give the folder of a sweep or of runs")
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} has schema {version}, this fedlora reads up to {SCHEMA_VERSION}; "
                "use the fedlora that wrote it, or a newer one"
            )

    def put(self, *runs: StoredRun, keep_labels: bool = False) -> None:
        """Keep `runs`, all or none, in place of what was kept of their folders before.

        Args:
            keep_labels: a run that is there keeps its digest, role and axes: only the sweep knows them for certain.

        Raises:
            StoreError: the disk is full or read-only; what was kept before stays.
        """
        with self._change():
            for run in runs:
                row = _row(run)
                changed = [name for name in row if not (keep_labels and name in _LABELS)]
                self._connection.execute(
                    f"INSERT INTO runs ({', '.join(row)}) VALUES ({', '.join(f':{name}' for name in row)}) "
                    f"ON CONFLICT (folder) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in changed)}",
                    row,
                )

    def remove(self, folder: str) -> None:
        """Forget the run of `folder`; its files are the caller's."""
        with self._change():
            self._connection.execute("DELETE FROM runs WHERE folder = ?", (folder,))

    def runs(self) -> list[StoredRun]:
        """All of them, by folder.

        Raises:
            StoreError: the file is damaged.
        """
        with _said(self.path):
            return [_run(*row) for row in self._connection.execute(f"{_WHOLE} ORDER BY folder")]

    def get(self, folder: str) -> StoredRun:
        """The run of `folder`, which is there."""
        with _said(self.path):
            return _run(*self._connection.execute(f"{_WHOLE} WHERE folder = ?", (folder,)).fetchone())

    def stamps(self) -> dict[str, str]:
        """By folder, to find runs that changed without reading them all."""
        with _said(self.path):
            return dict(self._connection.execute("SELECT folder, stamp FROM runs"))

    def select(
        self,
        where: str = "TRUE",
        *,
        equal: Mapping[str, Any] | None = None,
        order: str = "folder",
        descending: bool = False,
    ) -> list[dict[str, Any]]:
        """`COLUMNS` of the runs for which the SQL expression `where` holds; it can read and do nothing else.

        Args:
            equal: values of columns that the runs have besides; of task and method, also labels on any axis.
            order: a column; runs without a value come last.

        Raises:
            ConfigError: `where` is no expression on the columns of the store.
            StoreError: the file is damaged.
        """
        values = dict(equal or {})
        conditions = [f"({where}\n)", *map(_equal, values)]  # a comment ends with its line
        values |= {f"{name}_label": _json(values[name]) for name in _NAMED_BY_SWEEPS if name in values}
        sql = (
            f"SELECT {', '.join(COLUMNS)} FROM {_SEEN} WHERE {' AND '.join(conditions)} "
            f"ORDER BY {order} IS NULL, {order} {'DESC' if descending else 'ASC'}, folder"
        )
        self._connection.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY
        )
        try:
            with _said(self.path):
                rows = self._connection.execute(sql, values).fetchall()
        except StoreError as error:
            cause = error.__cause__
            if getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in _ADVICE:
                raise
            raise ConfigError(
                f"the condition {where!r} cannot be used: {cause}; it is an SQL expression on {', '.join(COLUMNS)}, "
                "or on JSON as in record ->> '$.config.federation.clients' = 3"
            ) from cause
        finally:
            self._connection.set_authorizer(None)
        return [{**dict(zip(COLUMNS, row, strict=True)), "axes": json.loads(row[3])} for row in rows]

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """All of a change or nothing."""
        with _said(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk has rolled back already
                    self._connection.execute("ROLLBACK")
                raise


def _equal(column: str) -> str:
    """Of task and method sweeps have names of their own: labels, which `axes` holds as `"axis":"label"`."""
    if column in _NAMED_BY_SWEEPS:
        return f"({column} = :{column} OR instr(axes, ':' || :{column}_label))"
    return f"{column} = :{column}"


def _row(run: StoredRun) -> dict[str, Any]:
    config, record = run.settings, run.record or {}
    metric = record.get("metric", {})
    epsilon = config.get("privacy", {}).get("epsilon")
    return {
        "folder": run.folder,
        "digest": run.digest,
        "role": run.role,
        "axes": _json(dict(run.axes)),
        "status": run.status,
        "error": run.error,
        "task": config.get("data", {}).get("task"),
        "method": config.get("adapter", {}).get("method"),
        "epsilon": None if epsilon is None else float(epsilon),
        "seed": config.get("run", {}).get("seed"),
        "epsilon_spent": run.epsilon_spent,
        "private": run.private,
        "metric": metric.get("name"),
        "value": metric.get("value"),
        "rounds_done": len(run.rounds),
        "wall_seconds": run.seconds,
        "started": record.get("started"),
        "stamp": run.stamp,
        "config": None if run.record is not None or run.config is None else _json(run.config),
        "record": None if run.record is None else _json(run.record),
        "rounds": _json(list(run.rounds)),
    }


def _run(
    folder: str,
    digest: str,
    role: Any,
    axes: str,
    error: str,
    record: str | None,
    rounds: str,
    config: str | None,
    stamp: str,
) -> StoredRun:
    return StoredRun(
        folder=folder,
        digest=digest,
        role=role,
        axes=json.loads(axes),
        error=error,
        record=None if record is None else json.loads(record),
        rounds=json.loads(rounds),
        config=None if config is None else json.loads(config),
        stamp=stamp,
    )


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Whatever is wrong with the file, in one line."""
    try:
        yield
    except (sqlite3.Error, ValueError) as error:  # ValueError: JSON that was altered by hand, a name that is no text
        code = getattr(error, "sqlite_errorcode", None) or 0
        advice = _ADVICE.get(code & 0xFF, "what it held before is still there")
        raise StoreError(f"cannot use the store of runs {path}: {error}; {advice}") from error


def _json(value: Any) -> str:
    return json.dumps(to_json(value), separators=(",", ":"))
