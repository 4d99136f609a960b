"""runs.sqlite: the records of many runs in one file beside their folders, to be listed, compared and reported.

A run's own folder stays the truth while it is there: the store is filled from it, and can be made again. Where only the
store is kept, as for results that are published, it holds everything that tables and figures are made of.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from fedlora.errors import StoreError

FILE_NAME = "runs.sqlite"
SCHEMA_VERSION = 1
_APPLICATION = 0x6665646C  # "fedl": another program's database is not taken for a store

_TABLE = """
CREATE TABLE runs (
    folder TEXT PRIMARY KEY,   -- of the run, relative to the store's own
    digest TEXT NOT NULL,      -- of the config that was asked for
    role TEXT NOT NULL,        -- cell | trial | run
    axes TEXT NOT NULL,        -- JSON: the sweep's axes, and this run's label on each
    status TEXT NOT NULL,      -- done | failed
    error TEXT NOT NULL,       -- one line; empty where done
    task TEXT, method TEXT, epsilon REAL, seed INTEGER, metric TEXT, value REAL, wall_seconds REAL, started TEXT,
    record TEXT,               -- record.json, whole
    rounds TEXT                -- JSON list of the lines of rounds.jsonl
) STRICT
"""


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """One run as it is kept.

    Attributes:
        folder: of the run, relative to the store's own; what the run is called.
        digest: of the config that was asked for, `RunConfig.digest`.
        role: a cell of a sweep, a trial for its settings, or a run by itself.
        axes: label by axis of the sweep, in its order.
        error: why it failed, in one line; empty where it is done.
        record: record.json; None where it failed.
        rounds: lines of rounds.jsonl.
    """

    folder: str
    digest: str
    role: Literal["cell", "trial", "run"] = "run"
    axes: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    record: Mapping[str, Any] | None = None
    rounds: Sequence[Mapping[str, Any]] = ()

    @property
    def status(self) -> Literal["done", "failed"]:
        return "failed" if self.error else "done"


class Store:
    """An open store. Every change is on disk when the call returns."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """Use `open` or `create`."""
        self.path, self._connection = path, connection

    @classmethod
    def create(cls, folder: Path) -> Self:
        """The store in `folder`, made where there is none.

        Raises:
            StoreError: it cannot be made, or what is there is not a store of this version.
        """
        path = folder / FILE_NAME
        if path.exists():
            return cls.open(path)
        store = cls(path, _connect(path, "rwc"))
        with _said(path), store._connection as connection:
            connection.execute("PRAGMA journal_mode = DELETE")  # one file, whole after every change
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return store

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Self:
        """The store at `path`: its file, or the folder that it lies in.

        Raises:
            StoreError: there is none, it is something else, or of a newer version.
        """
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise StoreError(f"{path} is not there; give a folder of runs or a sweep's, or run `fedlora sweep` first")
        store = cls(path, _connect(path, "ro" if read_only else "rw"))
        try:
            store._check_version()
        except BaseException:
            store.close()
            raise
        return store

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

    def put(self, run: StoredRun) -> None:
        """Keep `run`, in place of what was kept of its folder before.

        Raises:
            StoreError: the disk is full or read-only; what was kept before stays.
        """
        record = run.record or {}
        config, metric = record.get("config", {}), record.get("metric", {})
        row = {
            "folder": run.folder,
            "digest": run.digest,
            "role": run.role,
            "axes": _json(dict(run.axes)),
            "status": run.status,
            "error": run.error,
            "task": config.get("data", {}).get("task"),
            "method": config.get("adapter", {}).get("method"),
            "epsilon": float(config["privacy"]["epsilon"]) if config else None,
            "seed": config.get("run", {}).get("seed"),
            "metric": metric.get("name"),
            "value": metric.get("value"),
            "wall_seconds": record.get("wall_seconds"),
            "started": record.get("started"),
            "record": None if run.record is None else _json(run.record),
            "rounds": _json(list(run.rounds)),
        }
        columns, places = ", ".join(row), ", ".join(f":{name}" for name in row)
        with _said(self.path), self._connection as connection:
            connection.execute(f"INSERT OR REPLACE INTO runs ({columns}) VALUES ({places})", row)

    def remove(self, folder: str) -> None:
        """Forget the run of `folder`; its files are the caller's."""
        with _said(self.path), self._connection as connection:
            connection.execute("DELETE FROM runs WHERE folder = ?", (folder,))

    def runs(self) -> list[StoredRun]:
        """All of them, by folder.

        Raises:
            StoreError: the file is damaged.
        """
        query = "SELECT folder, digest, role, axes, error, record, rounds FROM runs ORDER BY folder"
        with _said(self.path):
            return [_row(*row) for row in self._connection.execute(query)]

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _row(folder: str, digest: str, role: Any, axes: str, error: str, record: str | None, rounds: str) -> StoredRun:
    return StoredRun(
        folder=folder,
        digest=digest,
        role=role,
        axes=json.loads(axes),
        error=error,
        record=None if record is None else json.loads(record),
        rounds=json.loads(rounds),
    )


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    with _said(path):
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=30)
        connection.execute("PRAGMA synchronous = FULL")
        return connection


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Whatever is wrong with the file, in one line."""
    try:
        yield
    except (sqlite3.Error, ValueError) as error:  # ValueError: JSON that was altered by hand
        raise StoreError(f"cannot use the store of runs {path}: {error}; what it held before is still there") from error


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
