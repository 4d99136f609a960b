"""What each data set has been charged, kept up with the log: a round costs its own rows, however long the log is.

A tally stands for a beginning of the log, known by the digest of its last row, which is one over all rows before. If
the log still begins so, only the rows after it are read; otherwise (a transaction was taken back, another file was put
in its place) all are. So it always says what adding up the whole log would.
"""

from __future__ import annotations

from collections import defaultdict

from fedlora.privacy.accounting import Charge
from fedlora.privacy.ledger_file import RESERVED, LedgerFile

Owner = tuple[str, str]
"""Name and fingerprint that something was charged to; the name may be empty."""

_ROWS = """
SELECT id, digest, kind, unit, relation, data_set, fingerprint, sampling_probability, noise_multiplier, num_steps
FROM entry WHERE id > ? ORDER BY id
"""


class Tally:
    """Charges by data set, apart for each unit and relation. For use inside a transaction, after `catch_up`."""

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self._count, self._digest = 0, ""
        self._sums: defaultdict[tuple[str, str], _Sums] = defaultdict(_Sums)

    def catch_up(self, file: LedgerFile) -> None:
        """Read what was appended since it last did."""
        if self._count and file.query("SELECT digest FROM entry WHERE id = ?", (self._count,)) != [(self._digest,)]:
            self._start_anew()
        for number, digest, kind, unit, relation, name, fingerprint, *charge in file.query(_ROWS, (self._count,)):
            if kind == RESERVED:
                self._sums[unit, relation].add((name, fingerprint), number, *charge)
            self._count, self._digest = number, digest

    def kin(self, unit: str, relation: str, owner: Owner) -> set[Owner]:
        """`owner` and all that were charged and share a name or a fingerprint with it, directly or through others."""
        return self._sums[unit, relation].kin(owner)

    def charges(self, unit: str, relation: str, owner: Owner) -> list[Charge]:
        """Of `owner` and its kin, in equal blocks; the block charged last comes last, as pricing wants it."""
        return self._sums[unit, relation].charges(owner)


class _Sums:
    """Steps by owner and kind of charge, with the number of the last row of that kind."""

    def __init__(self) -> None:
        self._blocks: defaultdict[Owner, dict[tuple[float, float], tuple[int, int]]] = defaultdict(dict)
        self._sharing: defaultdict[tuple[str, str], set[Owner]] = defaultdict(set)

    def add(self, owner: Owner, row: int, sampling_probability: float, noise_multiplier: float, num_steps: int) -> None:
        blocks, kind = self._blocks[owner], (sampling_probability, noise_multiplier)
        blocks[kind] = (blocks.get(kind, (0, 0))[0] + num_steps, row)
        for mark in _marks(owner):
            self._sharing[mark].add(owner)

    def kin(self, owner: Owner) -> set[Owner]:
        found, open_ends = {owner}, [owner]
        while open_ends:
            for mark in _marks(open_ends.pop()):
                new = self._sharing.get(mark, set()) - found
                found |= new
                open_ends += new
        return found

    def charges(self, owner: Owner) -> list[Charge]:
        total: dict[tuple[float, float], tuple[int, int]] = {}
        for one in self.kin(owner):
            for kind, (steps, row) in self._blocks.get(one, {}).items():
                earlier, last = total.get(kind, (0, 0))
                total[kind] = earlier + steps, max(last, row)
        return [Charge(*kind, steps) for kind, (steps, _) in sorted(total.items(), key=lambda block: block[1][1])]


def _marks(owner: Owner) -> list[tuple[str, str]]:
    """By which an owner is known; nobody is known by an empty name."""
    name, fingerprint = owner
    return [("fingerprint", fingerprint), *([("name", name)] if name else [])]
