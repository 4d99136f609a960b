"""The last answer that a site gave in each run, and what it remembers of the run, on its own disk.

Asked the same again, it gives the same bits: noised once, charged once, and a resend tells nobody anything new. This is
what lets a server, a courier or the daemon itself be killed at any moment without a round being lost or spent twice.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from fedlora.errors import LedgerUnavailable

KEPT_RUNS = 16
"""Runs whose last answers are kept; of older ones only the ledger knows, which refuses their rounds as before."""
WAIT_SECONDS = 60.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answer (
    number INTEGER PRIMARY KEY,  -- grows: the newest is the largest
    data_set TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    asked TEXT NOT NULL,         -- digest of the question
    answer BLOB,                 -- NULL: the round was spent without one
    memory BLOB NOT NULL,        -- of federation.memory
    UNIQUE (data_set, run)
) STRICT
"""


@dataclass(frozen=True, kw_only=True)
class KeptAnswer:
    """What a site keeps of the last round it did in a run."""

    round_index: int
    asked: str
    """SHA-256 of the question, in hex: configuration, client and instruction."""
    update: bytes | None = field(repr=False)
    """As it left; None where the round failed after it was charged."""
    memory: bytes = field(repr=False)


class Answers:
    """The file of a site's last answers; safe for several threads."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        """Use `open`."""
        self._connection, self._path = connection, path

    @classmethod
    def open(cls, path: Path) -> Self:
        """The file at `path`, made (readable by its owner only) where it does not exist.

        Raises:
            LedgerUnavailable: it cannot be opened or made.
        """
        try:
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            connection = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA synchronous = FULL")  # what has left is known after a power cut
            connection.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise _unusable(path, error) from error
        return cls(connection, path)

    def close(self) -> None:
        self._connection.close()

    def last(self, data_set: str, run: str) -> KeptAnswer | None:
        """What is kept of `run` on `data_set`.

        Raises:
            LedgerUnavailable: the file cannot be read.
        """
        question = "SELECT round, asked, answer, memory FROM answer WHERE data_set = ? AND run = ?"
        try:
            row = self._connection.execute(question, (data_set, run)).fetchone()
        except sqlite3.Error as error:
            raise _unusable(self._path, error) from error
        return None if row is None else KeptAnswer(round_index=row[0], asked=row[1], update=row[2], memory=row[3])

    def keep(self, data_set: str, run: str, kept: KeptAnswer) -> None:
        """Put `kept` in place of what was kept of the run; on disk when this returns.

        Raises:
            LedgerUnavailable: it cannot be written.
        """
        row = (data_set, run, kept.round_index, kept.asked, kept.update, kept.memory)
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.execute("DELETE FROM answer WHERE data_set = ? AND run = ?", (data_set, run))
                self._connection.execute(
                    "INSERT INTO answer (data_set, run, round, asked, answer, memory) VALUES (?, ?, ?, ?, ?, ?)", row
                )
                self._connection.execute(
                    "DELETE FROM answer WHERE number NOT IN (SELECT number FROM answer ORDER BY number DESC LIMIT ?)",
                    (KEPT_RUNS,),
                )
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise _unusable(self._path, error) from error


def _unusable(path: Path, error: Exception) -> LedgerUnavailable:
    return LedgerUnavailable(f"cannot use the site's answers {path}: {error}; put the disk right, or name another file")
