"""What an open ledger remembers of its log is what is in it, whoever wrote it and whatever was taken back."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedlora.errors import BudgetRefused
from fedlora.privacy.accounting import Charge
from fedlora.privacy.ledger import Cap, DataSet, Ledger, Request
from fedlora.privacy.ledger_file import _GENESIS

OWNERS = [DataSet(fingerprint=mark, name=name) for mark, name in [("a", "x"), ("b", "x"), ("b", ""), ("c", "z")]]
NO_ROOM = Cap(epsilon=1e-9, delta=1e-5)


def request(number: int, owner: DataSet, steps: int = 1, cap: Cap | None = None) -> Request:
    charge = Charge(1.0, 5.0 + number % 3, steps)
    return Request(data_set=owner, charge=charge, run="run", round_index=number, purpose="finetune", cap=cap)


def test_ledgers_that_charge_in_turn_see_all_of_it_and_nothing_that_was_refused(tmp_path: Path) -> None:
    path, draw = tmp_path / "ledger.sqlite", random.Random(3)
    with closing(Ledger.open(path)) as one, closing(Ledger.open(path)) as other:
        for number in range(25):
            ledger, owner = draw.choice([one, other]), draw.choice(OWNERS)
            if draw.random() < 0.4:
                with pytest.raises(BudgetRefused):
                    ledger.reserve([request(number, owner, 1000), request(1000, owner, cap=NO_ROOM)])
            ledger.reserve([request(number, owner, draw.randint(1, 9))])
            with closing(Ledger.open(path)) as fresh:
                for asked in OWNERS:
                    assert one.charges(asked) == other.charges(asked) == fresh.charges(asked)
        sums = "SELECT SUM(num_steps) FROM entry WHERE fingerprint IN ('a', 'b')"
        with closing(sqlite3.connect(path)) as raw:
            (total,) = raw.execute(sums).fetchone()
        assert sum(charge.num_steps for charge in one.charges(OWNERS[0])) == total


def test_the_kind_charged_last_comes_last(tmp_path: Path) -> None:
    with closing(Ledger.open(tmp_path / "ledger.sqlite")) as ledger:
        for number, owner in [(0, OWNERS[0]), (1, OWNERS[1]), (2, OWNERS[2]), (3, OWNERS[0])]:
            ledger.reserve([request(number, owner)])
        assert [charge.noise_multiplier for charge in ledger.charges(OWNERS[0])] == [6.0, 7.0, 5.0]


def test_a_log_put_in_its_place_is_read_anew() -> None:
    ledger = Ledger.in_memory()
    ledger.reserve([request(0, OWNERS[0], 7), request(1, OWNERS[0], 7)])
    assert sum(charge.num_steps for charge in ledger.charges(OWNERS[0])) == 14
    with ledger._file.transaction():
        ledger._file.query("DELETE FROM entry")
        ledger._file.query("UPDATE head SET count = 0, digest = ?", (_GENESIS,))
    ledger.reserve([request(0, OWNERS[0], 2), request(1, OWNERS[0], 3), request(2, OWNERS[0], 4)])
    assert sum(charge.num_steps for charge in ledger.charges(OWNERS[0])) == 9
