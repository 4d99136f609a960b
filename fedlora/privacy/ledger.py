"""What a data set has spent, on the disk of its owner: charged before release, added up over all runs, never forgotten.

One SQLite file per site. Its only table of records is an append-only log: a row for a reserved charge, and later a row
saying that it was `spent` (the update left) or `abandoned` (it never will). All three kinds count alike: a crash wastes
budget and hides none. Every row carries the SHA-256 of the row before it, so a removed or altered one shows.

A budget belongs to records, not to runs. Rows belong together if they share the data set's fingerprint or the name the
site gave it, directly or through other rows: neither a new run, nor a changed record, nor a new name starts afresh.

Neither torch nor numpy, so that a privacy officer can read a ledger anywhere. SQLite's locks do not work on network
file systems; a ledger belongs on a local disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedlora.errors import BudgetRefused, LedgerBroken, LedgerUnavailable, ProtocolError, RoundRepeated
from fedlora.privacy.accounting import Charge, epsilon_with

FORMAT = 1
WAIT_SECONDS = 60.0
"""How long one process waits for another that holds the ledger."""

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
"""

# Names and fingerprints that belong together with a data set's, through any chain of rows that share one of them.
_KIN = """
WITH RECURSIVE
known(data_set, fingerprint) AS (
    SELECT DISTINCT data_set, fingerprint FROM entry WHERE kind = 'reserved' AND unit = :unit AND relation = :relation),
kin(data_set, fingerprint) AS (
    SELECT :name, :fingerprint
    UNION SELECT known.data_set, known.fingerprint FROM known JOIN kin
    ON known.fingerprint = kin.fingerprint OR (known.data_set = kin.data_set AND kin.data_set <> ''))
"""

_CHARGED = """
SELECT sampling_probability, noise_multiplier, SUM(num_steps) FROM entry
WHERE kind = 'reserved' AND unit = :unit AND relation = :relation AND (data_set, fingerprint) IN kin
GROUP BY sampling_probability, noise_multiplier ORDER BY MAX(id)
"""  # the block charged last comes last, as pricing wants it

_OPEN_ROUND = """
SELECT COUNT(*) FROM entry AS charge
WHERE kind = 'reserved' AND run = :run AND round = :round AND unit = :unit AND relation = :relation
AND (data_set, fingerprint) IN kin
AND NOT EXISTS (SELECT 1 FROM entry WHERE reservation = charge.id AND kind = 'abandoned')
"""

_IS_OPEN = """
SELECT 1 FROM entry WHERE id = ?1 AND kind = 'reserved' AND NOT EXISTS (SELECT 1 FROM entry WHERE reservation = ?1)
"""


_Row = dict[str, str | int | float | None]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Whose budget it is: records of one site, and what is added or removed between neighbouring versions of them."""

    fingerprint: str
    """`data.fingerprint.fingerprint` of the records. Never leaves the site."""
    name: str = ""
    """The site's own name for them, which lasts when records change; empty in a simulation."""
    unit: str = "record"
    relation: str = "add/remove"


@dataclass(frozen=True, kw_only=True)
class Cap:
    """The most that all runs together may spend on a data set: `epsilon` at `delta`."""

    epsilon: float
    delta: float


@dataclass(frozen=True, kw_only=True)
class Request:
    """One round's cost for one data set, to be reserved before anything private is computed."""

    data_set: DataSet
    charge: Charge
    run: str
    round_index: int
    purpose: str
    outlook: tuple[Charge, ...] = ()
    """What the run will still ask for after this: nothing is granted to a run that could not be finished."""
    cap: Cap | None = None
    """None charges without a limit: a simulated site, whose plan is its only limit."""


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


class Ledger:
    """A site's ledger; safe for several threads and processes at once."""

    def __init__(self, connection: sqlite3.Connection, place: str, *, writable: bool = True) -> None:
        """Use `open`, `read` or `in_memory`."""
        self._connection, self._place, self._lock = connection, place, threading.Lock()
        self._begin = "BEGIN IMMEDIATE" if writable else "BEGIN"
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
            LedgerUnavailable, LedgerBroken: as `open`.
        """
        try:
            if not path.is_file():
                raise LedgerUnavailable(f"there is no ledger at {path}; give the path of a site's ledger file")
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

    # Charging ----------------------------------------------------------------------------------------------------

    def reserve(self, requests: Sequence[Request]) -> list[int]:
        """Charge all `requests` or none; when this returns, they are on disk.

        Returns:
            A reservation number for each, to `settle` once its update may leave.

        Raises:
            BudgetRefused: with one of them its data set would pass its cap.
            RoundRepeated: the data set has been charged for this round of this run already.
            LedgerUnavailable, LedgerBroken: nothing could be written.
        """
        with self._transaction():
            return [self._reserve(request) for request in requests]

    def check_room(self, data_set: DataSet, charges: Sequence[Charge], cap: Cap) -> None:
        """Whether `charges` would be granted now. Charges nothing and promises nothing.

        Raises:
            BudgetRefused: together with all that is charged they pass the cap.
        """
        with self._transaction():
            self._refuse_overspending(data_set, charges, cap, "this run")

    def settle(self, reservations: Sequence[int]) -> None:
        """Note that the updates of these reservations may leave the site.

        Raises:
            ProtocolError: one of them is not open: never made, settled before, or abandoned meanwhile.
            LedgerUnavailable, LedgerBroken: nothing could be written.
        """
        with self._transaction():
            for reservation in reservations:
                if not self._connection.execute(_IS_OPEN, (reservation,)).fetchone():
                    raise ProtocolError(f"reservation {reservation} is not open; its update does not leave the site")
                self._append(SPENT, {"reservation": reservation})

    def abandon(self, run: str, *, from_round: int) -> None:
        """Let rounds of a simulation be done anew whose updates died with their process. They stay counted."""
        with self._transaction():
            unfinished = self._connection.execute(
                "SELECT id FROM entry AS charge WHERE kind = 'reserved' AND run = ? AND round >= ? AND NOT EXISTS "
                "(SELECT 1 FROM entry WHERE reservation = charge.id AND kind = 'abandoned') ORDER BY id",
                (run, from_round),
            ).fetchall()
            for (reservation,) in unfinished:
                self._append(ABANDONED, {"reservation": reservation})

    # Reading -----------------------------------------------------------------------------------------------------

    def charges(self, data_set: DataSet) -> list[Charge]:
        """Everything ever charged to the data set, in equal blocks."""
        with self._transaction():
            return self._charged(data_set)

    def entries(self) -> list[Entry]:
        """The whole log, oldest first."""
        with self._transaction():
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
        with self._transaction():
            return self._verify(known_head)

    # Inside a transaction ----------------------------------------------------------------------------------------

    def _reserve(self, request: Request) -> int:
        data_set, charge = request.data_set, request.charge
        key = _key(data_set) | {"run": request.run, "round": request.round_index}
        if self._connection.execute(_KIN + _OPEN_ROUND, key).fetchone()[0]:
            raise RoundRepeated(
                f"round {request.round_index} of run {request.run} is charged to this data set already; "
                "each round is done once"
            )
        if request.cap is not None:
            rest = f"this run from round {request.round_index} on"
            self._refuse_overspending(data_set, [charge, *request.outlook], request.cap, rest)
        values: _Row = {
            "data_set": data_set.name,
            "fingerprint": data_set.fingerprint,
            "unit": data_set.unit,
            "relation": data_set.relation,
            "run": request.run,
            "round": int(request.round_index),
            "purpose": request.purpose,
            "sampling_probability": float(charge.sampling_probability),
            "noise_multiplier": float(charge.noise_multiplier),
            "num_steps": int(charge.num_steps),
            "cap_epsilon": float(request.cap.epsilon) if request.cap else None,
            "cap_delta": float(request.cap.delta) if request.cap else None,
        }
        return self._append(RESERVED, values)

    def _refuse_overspending(self, data_set: DataSet, charges: Sequence[Charge], cap: Cap, what: str) -> None:
        earlier = self._charged(data_set)
        total = epsilon_with(earlier, charges, cap.delta, enough=cap.epsilon)
        if total <= cap.epsilon:
            return
        spent = epsilon_with([], earlier, cap.delta) if earlier else 0.0
        alone = epsilon_with([], charges, cap.delta)
        raise BudgetRefused(
            f"the data set's budget does not suffice: charged so far ε = {spent:.4f}, {what} alone "
            f"ε = {alone:.4f}, together ε = {total:.4f}, above the cap of {cap.epsilon:g} "
            f"(all at δ = {cap.delta:g}); nothing was computed. Ask for fewer steps or more noise, or let the data's "
            "owner raise the cap"
        )

    def _charged(self, data_set: DataSet) -> list[Charge]:
        rows = self._connection.execute(_KIN + _CHARGED, _key(data_set)).fetchall()
        return [Charge(q, sigma, steps) for q, sigma, steps in rows]

    def _append(self, kind: str, values: _Row) -> int:
        count, previous = self._head()
        row: _Row = dict.fromkeys(_COLUMNS) | {"id": count + 1, "time": _now(), "kind": kind} | values
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
        with self._transaction():
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            (tables,) = self._connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if (version, tables) == (0, 0):
                for statement in _SCHEMA.split(";\n"):
                    self._connection.execute(statement)
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
        with self._transaction():
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version != FORMAT:
                raise LedgerBroken(f"{self._place} is no ledger of format {FORMAT}; give a site's ledger file")
            self._verify(None)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Everything in here or nothing, with no other process in between."""
        with self._lock:
            try:
                before = self._connection.total_changes
                self._connection.execute(self._begin)
                try:
                    yield
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
                if (
                    self._connection.total_changes > before
                ):  # whoever copies the one file, or removes the other, has all
                    self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except _UNUSABLE as error:
                raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> LedgerBroken | LedgerUnavailable:
        if isinstance(error, sqlite3.OperationalError):  # locked, read-only, disk full
            return LedgerUnavailable(f"cannot use the ledger {self._place}: {error}; nothing was computed")
        return LedgerBroken(f"{self._place} is no readable ledger ({error}); {_HELP}")


_UNUSABLE = (sqlite3.Error, UnicodeDecodeError)  # the latter where a damaged name lands in SQLite's own message
_HELP = "restore it from a backup and find out who changed it; until then nothing is computed on its data"


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


def _key(data_set: DataSet) -> dict[str, str]:
    return {
        "name": data_set.name,
        "fingerprint": data_set.fingerprint,
        "unit": data_set.unit,
        "relation": data_set.relation,
    }


def _digest(previous: str, row: tuple[str | int | float | None, ...]) -> str:
    """SHA-256 over the digest before and the row as JSON, whose numbers are written so that they read back equal."""
    return hashlib.sha256((previous + json.dumps(row, default=repr)).encode()).hexdigest()  # bytes: not of our making


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
