"""What was charged is on disk, added up over everything it belongs to, and cannot be changed unseen."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import (
    BudgetRefused,
    LedgerBroken,
    LedgerUnavailable,
    NoLedger,
    PrivacyError,
    ProtocolError,
    RoundRepeated,
)
from fedlora.privacy import ledger_file
from fedlora.privacy.accounting import Charge, epsilon, event
from fedlora.privacy.ledger import Cap, DataSet, Ledger, Request
from fedlora.privacy.ledger_file import ABANDONED, RESERVED, SPENT

DELTA = 1e-5
CHARGE = Charge(0.05, 1.5, 10)
GAUSSIAN = Charge(1.0, 8.0, 1)  # cheap to price, so that a race is about the ledger
WARD = DataSet(fingerprint="f" * 64, name="ward")


def request(round_index: int = 0, run: str = "run", data_set: DataSet = WARD, **changes: Any) -> Request:
    facts = {"charge": CHARGE, "purpose": "finetune"} | changes
    return Request(data_set=data_set, run=run, round_index=round_index, **facts)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with closing(Ledger.open(path)) as opened:
        yield opened


def steps(charges: list[Charge]) -> int:
    return sum(charge.num_steps for charge in charges)


# --- charging --------------------------------------------------------------------------------------------------------


def test_a_charge_is_on_disk_when_it_returns(ledger: Ledger, path: Path) -> None:
    ledger.reserve([request()])
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT kind, run, num_steps FROM entry").fetchall() == [("reserved", "run", 10)]
    for opened in (ledger, Ledger.open(path)):
        assert opened._file._connection.execute("PRAGMA synchronous").fetchone() == (2,), "FULL: fsync at every commit"
        assert opened._file._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        opened.close()


def test_all_or_none_are_charged(ledger: Ledger) -> None:
    small = Cap(epsilon=1e-3, delta=DELTA)
    other = DataSet(fingerprint="e" * 64, name="clinic")
    with pytest.raises(BudgetRefused):
        ledger.reserve([request(), request(data_set=other, cap=small)])
    with pytest.raises(RoundRepeated):
        ledger.reserve([request(), request()])
    assert ledger.entries() == []
    assert ledger.reserve([request(), request(data_set=other)]) == [1, 2]


def test_a_round_is_charged_once_even_after_reopening(path: Path) -> None:
    for _ in range(2):
        with closing(Ledger.open(path)) as ledger:
            if not ledger.entries():
                ledger.settle(ledger.reserve([request(3)]))
            with pytest.raises(RoundRepeated, match="round 3 of run run"):
                ledger.reserve([request(3)])
            with pytest.raises(RoundRepeated):
                ledger.reserve([request(3, data_set=DataSet(fingerprint="e" * 64, name="ward"))])
            assert steps(ledger.charges(WARD)) == 10
    with closing(Ledger.open(path)) as ledger:
        ledger.reserve([request(4), request(3, run="another"), request(3, data_set=DataSet(fingerprint="e" * 64))])


def test_a_refusal_spells_the_sum_and_charges_nothing(ledger: Ledger) -> None:
    ledger.reserve([request(0, charge=Charge(0.05, 1.5, 100))])
    new = Charge(0.05, 1.5, 300)
    spent, alone = epsilon([Charge(0.05, 1.5, 100)], DELTA), epsilon([new], DELTA)
    together = epsilon([Charge(0.05, 1.5, 400)], DELTA)
    with pytest.raises(BudgetRefused) as refused:
        ledger.reserve([request(1, charge=new, cap=Cap(epsilon=0.999 * together, delta=DELTA))])
    for value in (spent, alone, together):
        assert f"ε = {value:.4f}" in str(refused.value)
    assert len(ledger.entries()) == 1
    ledger.reserve([request(1, charge=new, cap=Cap(epsilon=1.001 * together, delta=DELTA))])


@pytest.mark.parametrize("share", [0.999, 1.01])
def test_different_charges_are_composed_as_dp_accounting_does(ledger: Ledger, share: float) -> None:
    """Within a percent from above: at 99.9 % of the exact ε nothing is granted, at 101 % all is."""
    from dp_accounting.pld import PLDAccountant

    charges = [Charge(1.0, 20.0, 1), Charge(0.05, 1.5, 120), Charge(0.02, 0.9, 40), Charge(1.0, 10.0, 2)]
    exact = PLDAccountant(value_discretization_interval=5e-5).compose(event(charges)).get_epsilon(DELTA)
    for number, charge in enumerate(charges[:-1]):
        ledger.reserve([request(number, charge=charge)])
    last = request(9, charge=charges[-1], cap=Cap(epsilon=share * exact, delta=DELTA))
    if share > 1:
        ledger.reserve([last])
    else:
        with pytest.raises(BudgetRefused):
            ledger.reserve([last])


def test_what_a_run_still_wants_has_to_fit_too(ledger: Ledger) -> None:
    whole = epsilon([Charge(0.05, 1.5, 50)], DELTA)
    later = (Charge(0.05, 1.5, 40),)
    with pytest.raises(BudgetRefused, match="this run from round 0 on alone"):
        ledger.reserve([request(outlook=later, cap=Cap(epsilon=0.99 * whole, delta=DELTA))])
    ledger.reserve([request(outlook=later, cap=Cap(epsilon=1.01 * whole, delta=DELTA))])
    assert steps(ledger.charges(WARD)) == 10, "an outlook is not charged"


def test_a_release_without_noise_passes_no_cap(ledger: Ledger) -> None:
    with pytest.raises(BudgetRefused, match="inf"):
        ledger.reserve([request(charge=Charge(0.1, 0.0, 1), cap=Cap(epsilon=1e6, delta=DELTA))])
    ledger.reserve([request(0, charge=Charge(0.1, 0.0, 1))])
    with pytest.raises(BudgetRefused, match="inf"):
        ledger.reserve([request(1, cap=Cap(epsilon=1e6, delta=DELTA))])


def test_what_is_abandoned_stays_counted_and_can_be_done_anew(ledger: Ledger) -> None:
    for number in range(3):
        ledger.settle(ledger.reserve([request(number)]))
    ledger.abandon("run", from_round=1)
    assert [entry.kind for entry in ledger.entries()].count(ABANDONED) == 2
    ledger.reserve([request(1)])
    with pytest.raises(RoundRepeated):
        ledger.reserve([request(0)])
    with pytest.raises(RoundRepeated):
        ledger.reserve([request(1)])
    assert steps(ledger.charges(WARD)) == 40
    ledger.abandon("run", from_round=1)
    assert [entry.kind for entry in ledger.entries()].count(ABANDONED) == 3, "each once"


def test_nothing_that_is_spent_is_taken_back(ledger: Ledger) -> None:
    """A copy of a run's folder is resumed again: its rounds had left already."""
    first = ledger.reserve([request(0)])
    ledger.settle(first)
    ledger.abandon("run", from_round=0)
    ledger.settle(ledger.reserve([request(0)]))
    ended = [(entry.reservation, entry.kind) for entry in ledger.entries() if entry.reservation]
    assert ended == [(1, "spent"), (1, ABANDONED), (4, "spent")]
    assert steps(ledger.charges(WARD)) == 20
    assert (ledger.rounds("run"), ledger.rounds("other")) == ({0}, set())


def test_only_an_open_reservation_is_settled(ledger: Ledger) -> None:
    settled, abandoned, open_one = (ledger.reserve([request(number)])[0] for number in (0, 2, 1))
    ledger.settle([settled])
    ledger.abandon("run", from_round=2)
    for wrong in (settled, abandoned, 0, 99, 4):
        with pytest.raises(ProtocolError, match="not open"):
            ledger.settle([open_one, wrong])
    assert [entry.kind for entry in ledger.entries()].count(SPENT) == 1, "all or none"
    ledger.settle([open_one])


def test_whole_numbers_make_a_ledger_that_reads_back(path: Path) -> None:
    with closing(Ledger.open(path)) as ledger:
        ledger.reserve([request(charge=Charge(1, 5, 1), cap=Cap(epsilon=6, delta=DELTA))])
        ledger.verify()
    Ledger.open(path).close()


# --- whose budget it is ----------------------------------------------------------------------------------------------


def data_set(fingerprint: str, name: str = "", **changes: str) -> DataSet:
    return DataSet(fingerprint=fingerprint, name=name, **changes)


@pytest.mark.parametrize(
    ("charged", "asked", "linked"),
    [
        ([data_set("a", "x")], data_set("a", "x"), True),
        ([data_set("a", "x")], data_set("a", "y"), True),
        ([data_set("a", "x")], data_set("b", "x"), True),
        ([data_set("a", "x")], data_set("b", "y"), False),
        ([data_set("a")], data_set("b"), False),
        ([data_set("a", "x"), data_set("b", "x")], data_set("b", "y"), True),
        ([data_set("a", "x"), data_set("a", "y"), data_set("b", "y"), data_set("b", "z")], data_set("c", "z"), True),
        ([data_set("a"), data_set("a", "y"), data_set("b", "y")], data_set("b"), True),
        ([data_set("a", unit="client")], data_set("a"), False),
        ([data_set("a", relation="replace")], data_set("a"), False),
        ([data_set("a", "x"), data_set("a", "y", unit="client"), data_set("b", "y")], data_set("b"), False),
    ],
)
def test_a_budget_follows_records_and_names(
    ledger: Ledger, charged: list[DataSet], asked: DataSet, linked: bool
) -> None:
    """`linked`: the first charge counts for the data set asked for, through whatever chain."""
    for number, owner in enumerate(charged):
        ledger.reserve([request(number, data_set=owner, charge=Charge(0.5, 1.0, 1000 if number == 0 else 1))])
    assert (steps(ledger.charges(asked)) >= 1000) is linked
    with pytest.raises(BudgetRefused) if linked else nullcontext():
        ledger.reserve([request(99, data_set=asked, cap=Cap(epsilon=30, delta=DELTA))])


# --- tampering -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of six rows of all kinds."""
    path = tmp_path_factory.mktemp("written") / "ledger.sqlite"
    with closing(Ledger.open(path)) as ledger:
        ledger.settle(ledger.reserve([request(0, cap=Cap(epsilon=9.0, delta=DELTA))]))
        ledger.settle(ledger.reserve([request(1, cap=Cap(epsilon=9.0, delta=DELTA))]))
        ledger.reserve([request(2)])
        ledger.abandon("run", from_round=2)
    return path


CHANGED = {
    "time": "time = '2000-01-01T00:00:00Z'",
    "kind": "kind = CASE kind WHEN 'spent' THEN 'abandoned' ELSE 'spent' END",
    "reservation": "reservation = ifnull(reservation, 0) + 1",
    "data_set": "data_set = ifnull(data_set, '') || 'x'",
    "fingerprint": "fingerprint = ifnull(fingerprint, '') || 'x'",
    "unit": "unit = ifnull(unit, '') || 'x'",
    "relation": "relation = ifnull(relation, '') || 'x'",
    "run": "run = ifnull(run, '') || 'x'",
    "round": "round = ifnull(round, 0) + 1",
    "purpose": "purpose = ifnull(purpose, '') || 'x'",
    "sampling_probability": "sampling_probability = ifnull(sampling_probability, 0.1) * (1 - 1e-15)",
    "noise_multiplier": "noise_multiplier = ifnull(noise_multiplier, 1) * 2",
    "num_steps": "num_steps = ifnull(num_steps, 1) - 1",
    "cap_epsilon": "cap_epsilon = ifnull(cap_epsilon, 1) * 2",
    "cap_delta": "cap_delta = NULL, cap_epsilon = 4",
    "previous": "previous = digest",
    "digest": "digest = previous",
}

TAMPERED = {
    **{
        f"{column} of row {row}": f"UPDATE entry SET {change} WHERE id = {row}"
        for column, change in CHANGED.items()
        for row in range(1, 7)
    },
    "first row removed": "DELETE FROM entry WHERE id = 1",
    "middle row removed": "DELETE FROM entry WHERE id = 3",
    "last row removed": "DELETE FROM entry WHERE id = 6",
    "all rows removed": "DELETE FROM entry",
    "last row removed, head set back": """
        DELETE FROM entry WHERE id = 6; UPDATE head SET count = 5""",
    "middle row removed and renumbered": """
        DELETE FROM entry WHERE id = 3; UPDATE entry SET id = id - 1 WHERE id > 3; UPDATE head SET count = 5""",
    "row copied to the end": f"""
        INSERT INTO entry SELECT 7, {", ".join(ledger_file._COLUMNS[1:])}, previous, digest FROM entry WHERE id = 6""",
    "row copied to the end, head set": f"""
        INSERT INTO entry SELECT 7, {", ".join(ledger_file._COLUMNS[1:])}, digest, digest FROM entry WHERE id = 6;
        UPDATE head SET count = 7""",
    "row before the first": f"""
        INSERT INTO entry SELECT 0, {", ".join(ledger_file._COLUMNS[1:])}, previous, digest FROM entry WHERE id = 1""",
    "two rows swapped": """
        UPDATE entry SET id = 100 WHERE id = 2; UPDATE entry SET id = 2 WHERE id = 4;
        UPDATE entry SET id = 4 WHERE id = 100""",
    "head's count": "UPDATE head SET count = 5",
    "head's digest": "UPDATE head SET digest = (SELECT digest FROM entry WHERE id = 5)",
    "head removed": "DELETE FROM head",
    "two heads": "INSERT INTO head VALUES (0, 'x')",
    "a table dropped": "DROP TABLE head",
    "rows dropped": "DROP TABLE entry",
    "a column added": "ALTER TABLE entry ADD COLUMN note TEXT",
    "a column added to the head": "ALTER TABLE head ADD COLUMN note TEXT",
    "a table added": "CREATE TABLE note (text TEXT)",
    "a trigger": "CREATE TRIGGER late AFTER INSERT ON entry BEGIN UPDATE entry SET num_steps = 0; END",
    "an index dropped": "DROP INDEX entry_by_round",
    "a later format": "PRAGMA user_version = 2",
    "no format": "PRAGMA user_version = 0",
}


@pytest.mark.parametrize("how", TAMPERED)
def test_tampering_shows(written: Path, path: Path, how: str) -> None:
    shutil.copy(written, path)
    opened = Ledger.open(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA foreign_keys = OFF")
        other.executescript(TAMPERED[how])
    with closing(opened):
        if "format" not in how:  # of an open ledger the format is known
            with pytest.raises((LedgerBroken, LedgerUnavailable)):
                opened.verify()
    for reopen in (Ledger.open, Ledger.read):
        with pytest.raises((LedgerBroken, LedgerUnavailable)) as refused:
            reopen(path)
        assert "\n" not in str(refused.value)


def test_a_cut_or_changed_end_shows_at_the_next_charge_of_an_open_ledger(written: Path, path: Path) -> None:
    shutil.copy(written, path)
    with closing(Ledger.open(path)) as opened, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("DELETE FROM entry WHERE id = 6")
        with pytest.raises(LedgerBroken, match="lacks its last rows"):
            opened.reserve([request(9)])


def test_an_old_copy_or_a_new_chain_lacks_a_head_noted_elsewhere(path: Path, tmp_path: Path) -> None:
    with closing(Ledger.open(path)) as ledger:
        ledger.reserve([request(0)])
        early = ledger.verify()
    shutil.copy(path, tmp_path / "old")
    with closing(Ledger.open(path)) as ledger:
        ledger.reserve([request(1)])
        late = ledger.verify(known_head=early)
        assert late not in (early, ledger.verify(known_head=late)[:-1])
    with closing(Ledger.open(tmp_path / "old")) as replayed:
        assert replayed.verify() == early
        with pytest.raises(LedgerBroken, match="head noted before"):
            replayed.verify(known_head=late)
    with closing(Ledger.open(tmp_path / "forged")) as forged:
        forged.reserve([request(0, charge=Charge(0.05, 1.5, 1))])
        with pytest.raises(LedgerBroken, match="head noted before"):
            forged.verify(known_head=early)


def test_a_flipped_bit_never_changes_what_is_read(written: Path, path: Path) -> None:
    """500 bits at random: the ledger reads as before, or is refused with a typed error."""
    with closing(Ledger.read(written)) as ledger:
        wanted = ledger.entries()
    raw, chance = written.read_bytes(), random.Random(0)
    refused = []
    for _ in range(500):
        damaged = bytearray(raw)
        damaged[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            with closing(Ledger.open(path)) as ledger:
                assert ledger.entries() == wanted
        except PrivacyError as error:
            refused.append(str(error))
        for left in path.parent.glob(f"{path.name}*"):
            left.unlink()
    assert len(refused) > 20, "or nothing was damaged"
    assert "\n" not in "".join(refused)


# --- files -----------------------------------------------------------------------------------------------------------


def no_parent(folder: Path) -> Path:
    return folder / "missing" / "ledger.sqlite"


def text(folder: Path) -> Path:
    (folder / "text").write_text("epsilon = 0\n" * 100)
    return folder / "text"


def other_database(folder: Path) -> Path:
    with closing(sqlite3.connect(folder / "other")) as connection:
        connection.execute("CREATE TABLE entry (id INTEGER)")
    return folder / "other"


def later_format(folder: Path) -> Path:
    Ledger.open(folder / "later").close()
    with closing(sqlite3.connect(folder / "later")) as connection:
        connection.execute("PRAGMA user_version = 99")
    return folder / "later"


@pytest.mark.parametrize("make", [Path, no_parent, text, other_database, later_format])
def test_what_is_no_ledger_is_refused_in_one_line_and_left_as_it_is(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(LedgerBroken if make is later_format else NoLedger) as misread:
        Ledger.read(path)
    assert (path.read_bytes() if path.is_file() else None) == before
    with pytest.raises((LedgerUnavailable, LedgerBroken)) as refused:
        Ledger.open(path)
    for said in (str(misread.value), str(refused.value)):
        assert "\n" not in said
        assert str(path) in said
    assert (path.read_bytes() if path.is_file() else None) == before or make is other_database


def test_no_file_is_made_where_one_must_be(path: Path) -> None:
    with pytest.raises(NoLedger):
        Ledger.read(path)
    with pytest.raises(LedgerUnavailable):
        Ledger.open(path, create=False)
    assert not path.exists()


@pytest.mark.parametrize("mask", [0o000, 0o022])
def test_only_the_owner_reads_it(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        ledger = Ledger.open(tmp_path / "ledger.sqlite")
        ledger.reserve([request()])
    finally:
        os.umask(before)
    files = [*tmp_path.iterdir()]
    assert len(files) == 3, "with SQLite's log and its index"
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    ledger.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
@pytest.mark.parametrize("mode", [0o000, 0o400])
def test_a_ledger_that_may_not_be_written_is_unavailable(written: Path, path: Path, mode: int) -> None:
    shutil.copy(written, path)
    path.chmod(mode)
    with pytest.raises(LedgerUnavailable, match="ermission denied"):
        Ledger.open(path)


def test_a_full_disk_charges_nothing(ledger: Ledger, path: Path) -> None:
    (pages,) = ledger._file._connection.execute("PRAGMA page_count").fetchone()
    ledger._file._connection.execute(f"PRAGMA max_page_count = {pages}")
    granted: list[int] = []

    def fill() -> None:
        for number in range(1000):
            granted.extend(ledger.reserve([request(number)]))

    with pytest.raises(LedgerUnavailable, match=r"full; nothing was computed"):
        fill()
    with closing(Ledger.open(path)) as reopened:
        assert [entry.id for entry in reopened.entries()] == granted != []


def test_a_ledger_held_by_another_is_unavailable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_file, "WAIT_SECONDS", 0.05)
    with closing(Ledger.open(path)) as ledger, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnavailable, match="locked"):
            ledger.reserve([request()])
        with closing(Ledger.read(path)) as reader:
            assert reader.entries() == []
        other.execute("ROLLBACK")
        ledger.reserve([request()])


def test_a_reader_sees_a_ledger_in_use_and_changes_nothing(path: Path) -> None:
    with closing(Ledger.open(path)) as ledger:
        for number in range(5):
            ledger.settle(ledger.reserve([request(number)]))
        with closing(Ledger.read(path)) as reader:
            assert reader.verify() == ledger.verify()
            ledger.reserve([request(5)])
            written = path.read_bytes()
            assert len(reader.entries()) == 11, "what came later, too"
            for change in (lambda: reader.reserve([request(6)]), lambda: reader.settle([11])):
                with pytest.raises(LedgerUnavailable, match="readonly"):
                    change()
        assert path.read_bytes() == written
        wanted = ledger.entries()
    before = path.read_bytes()
    with closing(Ledger.read(path)) as reader:
        assert reader.entries() == wanted
    assert [*path.parent.iterdir()] == [path]
    assert path.read_bytes() == before


# --- races -----------------------------------------------------------------------------------------------------------

RACE_CAP = Cap(epsilon=3.0, delta=DELTA)


def _meet(barrier: Any) -> None:
    """In every racing process, before it starts."""
    epsilon([GAUSSIAN], DELTA)
    barrier.wait()


def spend_all(path: Path, number: int, pause: float, sabotaged: bool) -> None:
    """Rounds until the cap is met, with a moment between looking at the budget and charging it."""
    check = Ledger._refuse_overspending

    def slow_check(self: Ledger, *arguments: Any) -> None:
        check(self, *arguments)
        time.sleep(pause * (1 + number))

    Ledger._refuse_overspending = slow_check  # type: ignore[method-assign]
    if sabotaged:
        ledger_file.LedgerFile.transaction = nullcontext  # type: ignore[assignment]
    with closing(Ledger.open(path)) as ledger:
        for index in range(200):
            try:
                ledger.settle(ledger.reserve([request(index, f"run{number}", charge=GAUSSIAN, cap=RACE_CAP)]))
            except BudgetRefused:
                return


def race(path: Path, pause: float, *, earlier: int = 0, sabotaged: bool = False) -> int:
    """Rounds in a ledger after three real processes have spent what `earlier` ones left."""
    context = multiprocessing.get_context("spawn")
    with closing(Ledger.open(path)) as ledger:
        ledger.reserve([request(number, charge=GAUSSIAN) for number in range(earlier)])
    with context.Pool(3, _meet, (context.Barrier(3),)) as pool:
        pool.starmap(spend_all, [(path, number, pause, sabotaged) for number in range(3)], chunksize=1)
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT COUNT(*) FROM entry WHERE kind = 'reserved'").fetchone()[0])


def most_rounds() -> int:
    """That fit under the cap, by the accountant itself."""
    fitting = (n for n in range(1, 200) if epsilon([Charge(1.0, 8.0, n)], DELTA) <= RACE_CAP.epsilon)
    return max(fitting)


def test_racing_processes_never_overspend(path: Path) -> None:
    assert race(path, 0.002) == most_rounds()
    Ledger.open(path).close()


@pytest.mark.parametrize("sabotaged", [False, True], ids=["as it is", "without transactions"])
def test_the_last_round_goes_to_one_of_three(path: Path, sabotaged: bool) -> None:
    """All three look at once and charge a fifth of a second apart; only the transaction keeps two of them out."""
    overspent = race(path, 0.2, earlier=most_rounds() - 1, sabotaged=sabotaged) > most_rounds()
    assert overspent is sabotaged


@pytest.mark.parametrize("shared", [True, False], ids=["one connection", "one each"])
def test_racing_threads_never_overspend(path: Path, shared: bool) -> None:
    ledger, granted, failed = Ledger.open(path), [], []

    def spend(name: str) -> None:
        try:
            own = ledger if shared else Ledger.open(path)
            for number in range(200):
                own.settle(own.reserve([request(number, name, charge=GAUSSIAN, cap=RACE_CAP)]))
                granted.append(number)
        except BudgetRefused:
            pass
        except BaseException as error:
            failed.append(error)
        if not shared:
            own.close()

    threads = [threading.Thread(target=spend, args=(f"run{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    ledger.verify()
    assert len(granted) == steps(ledger.charges(WARD)) == most_rounds()
    ledger.close()


CHARGE_ONCE = """
import sys
from contextlib import closing
from pathlib import Path
from fedlora.errors import BudgetRefused
from fedlora.privacy.accounting import Charge
from fedlora.privacy.ledger import Cap, DataSet, Ledger, Request

request = Request(
    data_set=DataSet(fingerprint="f"), charge=Charge(1.0, 6.0, 1), run=sys.argv[2], round_index=0, purpose="finetune",
    cap=Cap(epsilon=1.0, delta=1e-6),
)
with closing(Ledger.open(Path(sys.argv[1]))) as ledger:
    try:
        ledger.reserve([request])
    except BudgetRefused:
        sys.exit(3)
"""


@pytest.mark.parametrize("again", ["open", "read"])
def test_opening_a_ledger_twice_in_one_process_loses_no_charge(tmp_path: Path, again: str) -> None:
    """POSIX drops a process's locks on a file with any descriptor of it, and SQLite's log would go with them."""
    path = tmp_path / "ledger"

    def charged_elsewhere(run: str) -> int:
        return subprocess.run([sys.executable, "-c", CHARGE_ONCE, str(path), run], check=False).returncode

    with closing(Ledger.open(path)) as ledger, closing(getattr(Ledger, again)(path)):
        assert charged_elsewhere("other") == 0
        own = Request(
            data_set=DataSet(fingerprint="f"),
            charge=Charge(1.0, 6.0, 1),
            run="own",
            round_index=0,
            purpose="finetune",
            cap=Cap(epsilon=1.0, delta=1e-6),
        )
        ledger.reserve([own])  # two of these cost 0.98, three 1.24
        assert charged_elsewhere("third") == 3
        assert len(ledger.entries()) == 2


def test_between_charges_the_one_file_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger.open(path)
    request = Request(
        data_set=DataSet(fingerprint="f"), charge=Charge(1.0, 6.0, 1), run="r", round_index=0, purpose="finetune"
    )
    ledger.reserve([request])
    shutil.copy(path, tmp_path / "copy")
    ledger.close()
    with closing(Ledger.open(tmp_path / "copy")) as copy:
        assert len(copy.entries()) == 1


def test_a_ledger_made_by_two_at_once_is_one(tmp_path: Path) -> None:
    """Twenty times: all open the same missing file at the same instant."""
    for number in range(20):
        path, failed = tmp_path / f"ledger{number}", []
        together = threading.Barrier(4)

        def make(run: int, path: Path = path, failed: list[Exception] = failed, together: Any = together) -> None:
            together.wait()
            try:
                with closing(Ledger.open(path)) as ledger:
                    ledger.reserve([request(0, f"run{run}")])
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=make, args=(run,)) for run in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        with closing(Ledger.open(path)) as ledger:
            assert [entry.kind for entry in ledger.entries()] == [RESERVED] * 4
