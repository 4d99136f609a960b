"""The file under a ledger: an append-only table in SQLite whose rows are chained by their digests.

What a row means is the ledger's business (`privacy.ledger`). Here it is made sure that rows are on disk when a
transaction ends, that nobody else writes in between, and that a row removed or altered later shows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedlora.errors import LedgerBroken, LedgerUnavailable, NoLedger

FORMAT = 1
WAIT_SECONDS = 60.0
"""How long one process waits for another that holds the file."""

RESERVED, SPENT, ABANDONED = "reserved", "spent", "abandoned"

_GENESIS = hashlib.sha256(b"fedlora ledger 1").hexdigest()

_COLUMNS = (
    "id", "time", "kind", "reservation", "data_set", "fingerprint", "unit", "relation", "run", "round", "purpose",
    "sampling_probability", "noise_multiplier", "num_steps", "cap_epsilon", "cap_delta",
)  # fmt: skip

_SCHEMA = """
CREATE TABLE entry (
    id INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('reserved', 'spent', 'abandoned')),
    reservation INTEGER REFERENCES entry,  -- of a 'spent' or 'abandoned' row: which reservation it ends
    data_set TEXT, fingerprint TEXT, unit TEXT, relation TEXT,
    run TEXT, round INTEGER, purpose TEXT,
    sampling_probability REAL, noise_multiplier REAL, num_steps INTEGER,
    cap_epsilon REAL, cap_delta REAL,      -- under which it was granted; NULL: a simulated site without a policy
    previous TEXT NOT NULL,
    digest TEXT NOT NULL
) STRICT;
CREATE INDEX entry_by_round ON entry (run, round);
CREATE INDEX entry_by_reservation ON entry (reservation);
CREATE TABLE head (count INTEGER NOT NULL, digest TEXT NOT NULL) STRICT;  -- shows when the last rows are removed
"""  # SQLite keeps this text and every ledger is compared with it: a changed word is another FORMAT

_OBJECTS = "SELECT name, CAST(sql AS BLOB) FROM sqlite_master ORDER BY name"

Row = dict[str, str | int | float | None]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the log as stored; the fields of a reservation are empty in the rows that end one."""

    id: int
    time: str
    kind: str
    reservation: int | None
    data_set: str | None
    fingerprint: str | None
    unit: str | None
    relation: str | None
    run: str | None
    round: int | None
    purpose: str | None
    sampling_probability: float | None
    noise_multiplier: float | None
    num_steps: int | None
    cap_epsilon: float | None
    cap_delta: float | None


class LedgerFile:
    """Open rows of one ledger; safe for several threads and processes at once."""

    def __init__(self, connection: sqlite3.Connection, place: str, *, writable: bool = True) -> None:
        """Use `open`, `read` or `in_memory`."""
        self._connection, self._place, self._writable = connection, place, writable
        self._lock = threading.Lock()
        try:
            if writable:
                self._prepare()
            self._check_format()
        except BaseException:
            connection.close()
            raise

    @classmethod
    def open(cls, path: Path, *, create: bool = True) -> Self:
        """The ledger at `path`, checked from its first row to its last.

        Args:
            path: a file on a local disk, made (readable by its owner only) where it does not exist.
            create: False where a missing file is a mistake.

        Raises:
            LedgerUnavailable: it cannot be opened, made or locked.
            LedgerBroken: it is no ledger, or rows were removed or altered.
        """
        try:
            if create:
                _make_empty(path)
            elif not path.is_file():
                raise LedgerUnavailable(f"there is no ledger at {path}; give the path of a site's ledger file")
            return cls(_connect(path, "mode=rw"), str(path))
        except (OSError, sqlite3.Error, ValueError) as error:
            raise _unopened(path, error) from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """The ledger at `path`, checked, for one who charges nothing; also while a site has it open.

        No byte of it is written, and no file is made beside it: without a write-ahead log nobody has it open, and
        SQLite may take the file for complete.

        Raises:
            NoLedger: there is no file at `path`, or it never was a ledger.
            LedgerUnavailable, LedgerBroken: as `open`.
        """
        try:
            if not path.is_file():
                raise NoLedger(f"there is no ledger at {path}; give the path of a site's ledger file")
            in_use = path.with_name(f"{path.name}-wal").exists()
            return cls(_connect(path, "mode=ro" if in_use else "mode=ro&immutable=1"), str(path), writable=False)
        except (OSError, sqlite3.Error, ValueError) as error:
            raise _unopened(path, error) from error

    @classmethod
    def in_memory(cls) -> Self:
        """For simulated sites that leave no files; forgotten with the process."""
        return cls(sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False), "(in memory)")

    def close(self) -> None:
        self._connection.close()

    def entries(self) -> list[Entry]:
        """The whole log, oldest first."""
        with self.transaction():
            rows = self._connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM entry ORDER BY id").fetchall()
        return [Entry(**dict(zip(_COLUMNS, row, strict=True))) for row in rows]

    def verify(self, *, known_head: str | None = None) -> str:
        """Check every row against the chain.

        Args:
            known_head: a head noted earlier, elsewhere. Who can write the file can also compute a new chain; he cannot
                keep an old head in it.

        Returns:
            The head: the digest of the last row, which stands for all before it. Worth noting elsewhere.

        Raises:
            LedgerBroken: a row was removed, altered or added by other means, or `known_head` is not in the chain.
        """
        with self.transaction():
            return self._verify(known_head)

    # Inside a transaction ----------------------------------------------------------------------------------------

    def query(self, question: str, values: Mapping[str, object] | Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows of an SQL question."""
        return self._connection.execute(question, values).fetchall()

    def append(self, kind: str, values: Row) -> int:
        count, previous = self._head()
        row: Row = dict.fromkeys(_COLUMNS) | {"id": count + 1, "time": _now(), "kind": kind} | values
        digest = _digest(previous, tuple(row[name] for name in _COLUMNS))
        marks = ", ".join("?" * (len(_COLUMNS) + 2))
        self._connection.execute(f"INSERT INTO entry VALUES ({marks})", (*row.values(), previous, digest))
        self._connection.execute("UPDATE head SET count = ?, digest = ?", (count + 1, digest))
        return count + 1

    def _head(self) -> tuple[int, str]:
        """Number and digest of the last row, which must be the last one there is."""
        heads = self._connection.execute("SELECT count, digest FROM head").fetchall()
        last = self._connection.execute("SELECT id, digest FROM entry ORDER BY id DESC LIMIT 1").fetchone()
        if heads != [last or (0, _GENESIS)]:
            raise LedgerBroken(f"the ledger {self._place} lacks its last rows, or has rows of other making; {_HELP}")
        count, digest = heads[0]
        return count, digest

    def _verify(self, known_head: str | None) -> str:
        if self._connection.execute(_OBJECTS).fetchall() != _schema():
            raise LedgerBroken(f"the ledger {self._place} has tables or columns of other making; {_HELP}")
        previous, seen = _GENESIS, {_GENESIS}
        rows = self._connection.execute(f"SELECT {', '.join(_COLUMNS)}, previous, digest FROM entry ORDER BY id")
        for number, (*row, before, digest) in enumerate(rows, 1):
            if row[0] != number or before != previous or digest != _digest(previous, tuple(row)):
                raise LedgerBroken(f"row {number} of the ledger {self._place} was removed or altered; {_HELP}")
            previous = digest
            seen.add(digest)
        if self._head()[1] != previous or (known_head is not None and known_head not in seen):
            raise LedgerBroken(f"the ledger {self._place} does not contain the head noted before; {_HELP}")
        return previous

    def _prepare(self) -> None:
        try:
            self._switch_to_write_ahead_log()
            self._connection.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns
        except _UNUSABLE as error:
            raise self._unusable(error) from error
        with self.transaction():
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            (tables,) = self._connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if (version, tables) == (0, 0):
                _make_tables(self._connection)
                self._connection.execute("INSERT INTO head VALUES (0, ?)", (_GENESIS,))
                self._connection.execute(f"PRAGMA user_version = {FORMAT}")

    def _switch_to_write_ahead_log(self) -> None:
        """SQLite does not wait for another process that is at the same switch, so this does."""
        end = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def _check_format(self) -> None:
        with self.transaction():
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            names = [name for name, _ in self._connection.execute(_OBJECTS)]
            if version == 0 and "head" not in names:
                raise self._no_ledger("a database of something else" if names else "an empty file")
            if version != FORMAT:
                raise LedgerBroken(f"{self._place} is no ledger of format {FORMAT}; give a site's ledger file")
            self._verify(None)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything in here or nothing, with no other process in between."""
        with self._lock:
            try:
                before = self._connection.total_changes
                self._connection.execute("BEGIN IMMEDIATE" if self._writable else "BEGIN")
                try:
                    yield
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
                if self._connection.total_changes > before:  # who copies the one file, or removes the other, has all
                    self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except _UNUSABLE as error:
                raise self._unusable(error) from error

    def _no_ledger(self, what: str) -> LedgerBroken | NoLedger:
        """For one who reads, a wrong path; for one who charges, a ledger that may have been overwritten."""
        kind = LedgerBroken if self._writable else NoLedger
        return kind(f"{self._place} is no ledger but {what}; give a site's ledger, or its backup if this was one")

    def _unusable(self, error: Exception) -> LedgerBroken | LedgerUnavailable | NoLedger:
        reason = " ".join(str(error).split())  # it may quote lines of a damaged file
        if isinstance(error, sqlite3.OperationalError):  # locked, read-only, disk full
            return LedgerUnavailable(f"cannot use the ledger {self._place}: {reason}; nothing was computed")
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
            return self._no_ledger("not an SQLite file")
        return LedgerBroken(f"{self._place} is no readable ledger ({reason}); {_HELP}")


_UNUSABLE = (sqlite3.Error, UnicodeDecodeError)  # the latter where a damaged name lands in SQLite's own message
_HELP = "restore it from a backup and find out who changed it; until then nothing is computed on its data"


def _make_tables(connection: sqlite3.Connection) -> None:
    for statement in _SCHEMA.split(";\n"):
        connection.execute(statement)


@functools.cache
def _schema() -> list[tuple[str, bytes]]:
    """What `_OBJECTS` finds in a new ledger."""
    with closing(sqlite3.connect(":memory:")) as connection:
        _make_tables(connection)
        return connection.execute(_OBJECTS).fetchall()


def _make_empty(path: Path) -> None:
    """A new file for its owner's eyes only.

    An old one is left to SQLite alone: POSIX drops all of a process's locks on a file when any descriptor of it is
    closed, and SQLite's would go with ours.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    address = f"{path.absolute().as_uri()}?{mode}"
    return sqlite3.connect(address, uri=True, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)


def _unopened(path: Path, error: Exception) -> LedgerUnavailable:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return LedgerUnavailable(f"cannot open the ledger {path}: {reason}; nothing was computed")


def _digest(previous: str, row: tuple[str | int | float | None, ...]) -> str:
    """SHA-256 over the digest before and the row as JSON, whose numbers are written so that they read back equal."""
    return hashlib.sha256((previous + json.dumps(row, default=repr)).encode()).hexdigest()  # bytes: not of our making


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
