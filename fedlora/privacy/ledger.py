"""What a data set has spent, on the disk of its owner: charged before release, added up over all runs, never forgotten.

One SQLite file per site. Its only table of records is an append-only log: a row for a reserved charge, and later a row
saying that it was `spent` (the update may have left) or `abandoned` (its process died, and the round is done anew). All
three kinds count alike: a crash wastes budget and hides none. No row takes another back: what was spent stays so,
abandoned or not. Every row carries the SHA-256 of the row before it, so a removed or altered one shows.

A budget belongs to records, not to runs. Rows belong together if they share the data set's fingerprint or the name the
site gave it, directly or through other rows: neither a new run, nor a changed record, nor a new name starts afresh.

Neither torch nor numpy, so that a privacy officer can read a ledger anywhere. SQLite's locks do not work on network
file systems; a ledger belongs on a local disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from fedlora.errors import BudgetRefused, ProtocolError, RoundRepeated
from fedlora.privacy.accounting import Charge, epsilon_with
from fedlora.privacy.ledger_file import ABANDONED, RESERVED, SPENT, Entry, LedgerFile, Row
from fedlora.privacy.tally import Owner, Tally

_OPEN_ROUND = """
SELECT 1 FROM entry AS charge
WHERE kind = 'reserved' AND run = :run AND round = :round AND unit = :unit AND relation = :relation
AND data_set = :name AND fingerprint = :fingerprint
AND NOT EXISTS (SELECT 1 FROM entry WHERE reservation = charge.id AND kind = 'abandoned')
"""

_IS_OPEN = """
SELECT 1 FROM entry WHERE id = ?1 AND kind = 'reserved' AND NOT EXISTS (SELECT 1 FROM entry WHERE reservation = ?1)
"""


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


@dataclass(frozen=True)
class Ledger:
    """A site's ledger; safe for several threads and processes at once."""

    _file: LedgerFile
    _tally: Tally = field(default_factory=Tally)

    @classmethod
    def open(cls, path: Path, *, create: bool = True) -> Self:
        """The ledger at `path`, for charging; see `LedgerFile.open`."""
        return cls(LedgerFile.open(path, create=create))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The ledger at `path`, for one who charges nothing; see `LedgerFile.read`."""
        return cls(LedgerFile.read(path))

    @classmethod
    def in_memory(cls) -> Self:
        """For simulated sites that leave no files; forgotten with the process."""
        return cls(LedgerFile.in_memory())

    def close(self) -> None:
        self._file.close()

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
        with self._file.transaction():
            return [self._reserve(request) for request in requests]

    def check_room(self, data_set: DataSet, charges: Sequence[Charge], cap: Cap) -> None:
        """Whether `charges` would be granted now. Charges nothing and promises nothing.

        Raises:
            BudgetRefused: together with all that is charged they pass the cap.
        """
        with self._file.transaction():
            self._refuse_overspending(data_set, charges, cap, "this run")

    def settle(self, reservations: Sequence[int]) -> None:
        """Note that the updates of these reservations may leave the site.

        Raises:
            ProtocolError: one of them is not open: never made, settled before, or abandoned meanwhile.
            LedgerUnavailable, LedgerBroken: nothing could be written.
        """
        with self._file.transaction():
            for reservation in reservations:
                if not self._file.query(_IS_OPEN, (reservation,)):
                    raise ProtocolError(f"reservation {reservation} is not open; its update does not leave the site")
                self._file.append(SPENT, {"reservation": reservation})

    def abandon(self, run: str, *, from_round: int) -> None:
        """Let rounds of a simulation be done anew that its checkpoint does not know. They stay counted.

        Most died with their process. One that is spent may have left: the process may have lived on in a copy of the
        run's folder. Its row says so still, and doing it anew is one more release, charged like the first.
        """
        with self._file.transaction():
            unfinished = self._file.query(
                "SELECT id FROM entry AS charge WHERE kind = 'reserved' AND run = ? AND round >= ? AND NOT EXISTS "
                "(SELECT 1 FROM entry WHERE reservation = charge.id AND kind = 'abandoned') ORDER BY id",
                (run, from_round),
            )
            for (reservation,) in unfinished:
                self._file.append(ABANDONED, {"reservation": reservation})

    # Reading -----------------------------------------------------------------------------------------------------

    def rounds(self, run: str) -> set[int]:
        """Rounds of `run` that anything was ever charged for."""
        with self._file.transaction():
            return {index for (index,) in self._file.query("SELECT DISTINCT round FROM entry WHERE run = ?", (run,))}

    def charges_of_run(self, run: str) -> dict[int, Charge]:
        """What each round of `run` was charged, the last time where it was charged more than once."""
        rows = "SELECT round, sampling_probability, noise_multiplier, num_steps FROM entry WHERE run = ? ORDER BY id"
        with self._file.transaction():
            return {index: Charge(q, sigma, steps) for index, q, sigma, steps in self._file.query(rows, (run,))}

    def names(self) -> set[str]:
        """Of all data sets that anything was ever charged to."""
        with self._file.transaction():
            return {name for (name,) in self._file.query("SELECT DISTINCT data_set FROM entry WHERE data_set <> ''")}

    def charges(self, data_set: DataSet) -> list[Charge]:
        """Everything ever charged to the data set, in equal blocks."""
        with self._file.transaction():
            return self._charged(data_set)

    def entries(self) -> list[Entry]:
        """The whole log, oldest first."""
        return self._file.entries()

    def verify(self, *, known_head: str | None = None) -> str:
        """Check every row against the chain; see `LedgerFile.verify`."""
        return self._file.verify(known_head=known_head)

    # Inside a transaction ----------------------------------------------------------------------------------------

    def _reserve(self, request: Request) -> int:
        data_set, charge = request.data_set, request.charge
        if self._is_open(request):
            raise RoundRepeated(
                f"round {request.round_index} of run {request.run} is charged to this data set already; "
                "each round is done once"
            )
        if request.cap is not None:
            rest = f"this run from round {request.round_index} on"
            self._refuse_overspending(data_set, [charge, *request.outlook], request.cap, rest)
        values: Row = {
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
        return self._file.append(RESERVED, values)

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
            f"(all at δ = {cap.delta:g}); nothing was computed. Lower privacy.epsilon, ask for fewer steps or more "
            "noise, or let the data's owner raise the cap"
        )

    def _is_open(self, request: Request) -> bool:
        """Whether the round is charged to the data set already, under any of its names, and not abandoned."""
        unit, relation = request.data_set.unit, request.data_set.relation
        asked = {"run": request.run, "round": request.round_index, "unit": unit, "relation": relation}
        self._tally.catch_up(self._file)
        return any(
            self._file.query(_OPEN_ROUND, asked | {"name": name, "fingerprint": fingerprint})
            for name, fingerprint in self._tally.kin(unit, relation, _owner(request.data_set))
        )

    def _charged(self, data_set: DataSet) -> list[Charge]:
        self._tally.catch_up(self._file)
        return self._tally.charges(data_set.unit, data_set.relation, _owner(data_set))


def _owner(data_set: DataSet) -> Owner:
    return data_set.name, data_set.fingerprint
