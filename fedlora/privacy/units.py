"""A privacy guarantee in words: ε never stands without what it is about (DESIGN section 4, rule 10)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from fedlora.config import RunConfig

_UNCOVERED = (
    "several records of one person (k of them have about k times this ε), the same record at another site, "
    "other runs on the same data unless they share a ledger, the number of records where it is public, "
    "how long things take, and choices made outside the run"
)
_UNCOVERED_OF_CLIENTS = (
    "anything against the server, which sees each client's move with {noise}, single records beyond what holds for all "
    "of a client's together, one person's data at several clients (at k of them about k times this ε), that a client "
    "takes part and when it answers, other runs on the same data, how long things take, and choices made outside the "
    "run"
)
_PARTS = {"server": "no noise", "shared": "its part of the noise only"}
_FROM_WHOM = {
    "server": "from whoever is not the server, which is trusted",
    "shared": "from whoever sees sums alone, and of the noise the part of one other client at most",
}


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What one site's records are promised against the server and every other site, or a client's data against others.

    Attributes:
        epsilon: upper bound on ε; infinity where there is no guarantee.
        delta: the δ it holds at.
        accountant: which method bounds it, "pld" or "rdp".
        unit: what is added or removed between neighbouring data sets.
        relation: how neighbouring data sets differ.
        noise_seeded: noise and batches came from a public seed, so that nothing is promised.
        unsound: the mechanism adds noise and yet releases something without any.
        noise_by: who adds the noise, so who need not be trusted: the site itself; where clients are the unit, the
            "server", or all clients "shared".
    """

    epsilon: float
    delta: float
    accountant: str
    unit: str = "record"
    relation: str = "add/remove"
    noise_seeded: bool = False
    unsound: bool = False
    noise_by: Literal["site", "server", "shared"] = "site"

    @classmethod
    def from_config(cls, config: RunConfig, *, epsilon: float | None = None) -> Self:
        """The guarantee that `config` asks for or, with the `epsilon` that was spent, the one that was kept."""
        privacy = config.privacy
        unsound = config.unsound and math.isfinite(privacy.epsilon)
        return cls(
            epsilon=math.inf if unsound else privacy.epsilon if epsilon is None else epsilon,
            delta=privacy.delta,
            accountant=privacy.accountant,
            unit=privacy.unit,
            noise_seeded=privacy.seeded_noise,
            unsound=unsound,
            noise_by=privacy.client_noise if privacy.unit == "client" else "site",
        )

    @property
    def flaws(self) -> tuple[str, ...]:
        """Why nothing is promised; empty where something is."""
        without_noise = math.isinf(self.epsilon) and not self.unsound
        reasons = {
            "noise seeded, not private": self.noise_seeded,
            "ε = ∞, GReDP with real noise releases g_j − g_(n−j) as it is": self.unsound,
            "ε = ∞, run without noise": without_noise,
        }
        return tuple(reason for reason, holds in reasons.items() if holds)

    @property
    def not_covered(self) -> str:
        """What a reader might take to be promised and is not."""
        return _UNCOVERED if self.noise_by == "site" else _UNCOVERED_OF_CLIENTS.format(noise=_PARTS[self.noise_by])

    @property
    def whose(self) -> str:
        """What is protected, in a few words."""
        return f"one {self.unit} of one site" if self.noise_by == "site" else f"the whole data of one {self.unit}"

    @property
    def from_whom(self) -> str:
        """Against whom it holds."""
        return "against the server and every other site" if self.noise_by == "site" else _FROM_WHOM[self.noise_by]

    def __str__(self) -> str:
        """One line for a table or a terminal; add `not_covered` below it."""
        if self.flaws:
            return f"no guarantee: {'; '.join(self.flaws)}"
        whom = "" if self.noise_by == "site" else f", {self.from_whom}"
        return (
            f"ε = {rounded_up(self.epsilon):g} at δ = {self.delta:g} for {self.whose} "
            f"({self.relation}), by {self.accountant.upper()} accounting{whom}"
        )


def rounded_up(epsilon: float, digits: int = 4) -> float:
    """ε with `digits` significant digits, never less than it is: what is printed still bounds what was spent."""
    if epsilon <= 0 or math.isinf(epsilon):
        return epsilon
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - digits + 1)
    return float(f"{math.ceil(epsilon / unit) * unit:.{digits - 1}e}")
