"""A privacy guarantee in words: ε never stands without what it is about (DESIGN section 4, rule 10)."""

from __future__ import annotations

import math
from dataclasses import dataclass

_UNCOVERED = (
    "several records of one person (k of them have about k times this ε), the same record at another site, "
    "other runs on the same data, the number of records, and choices made outside the run"
)


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What one site's records are promised against the server and every other site.

    Attributes:
        epsilon: upper bound on ε; infinity where there is no guarantee.
        delta: the δ it holds at.
        accountant: which method bounds it, "pld" or "rdp".
        unit: what is added or removed between neighbouring data sets.
        relation: how neighbouring data sets differ.
        noise_seeded: noise and batches came from a public seed, so that nothing is promised.
    """

    epsilon: float
    delta: float
    accountant: str
    unit: str = "record"
    relation: str = "add/remove"
    noise_seeded: bool = False

    @property
    def not_covered(self) -> str:
        """What a reader might take to be promised and is not."""
        return _UNCOVERED

    def __str__(self) -> str:
        """One line for a table or a terminal; add `not_covered` below it."""
        if self.noise_seeded:
            return "no guarantee: noise seeded, not private"
        if math.isinf(self.epsilon):
            return "no guarantee: ε = ∞, run without noise"
        return (
            f"ε = {rounded_up(self.epsilon):g} at δ = {self.delta:g} for one {self.unit} of one site "
            f"({self.relation}), by {self.accountant.upper()} accounting"
        )


def rounded_up(epsilon: float, digits: int = 4) -> float:
    """ε with `digits` significant digits, never less than it is: what is printed still bounds what was spent."""
    if epsilon <= 0 or math.isinf(epsilon):
        return epsilon
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - digits + 1)
    return float(f"{math.ceil(epsilon / unit - 1e-9) * unit:.{digits - 1}e}")
