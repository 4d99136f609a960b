"""A site's own view of a run: its records, its plan, its secret, and what it has spent.

The server asks; the site looks into its own copy of the public schedule and does each of its rounds once, in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedlora.engine.training import OptimizerState
from fedlora.errors import ProtocolError
from fedlora.federation.messages import Facts, RoundInstruction
from fedlora.federation.schedule import ScheduledRound
from fedlora.privacy.accounting import epsilon_curve
from fedlora.privacy.plan import PrivacyPlan
from fedlora.randomness import SecretRoot


@dataclass(kw_only=True)
class Site:
    """One data owner in one run."""

    client: int
    records: np.ndarray
    """Positions of its records in the data set at hand, int64 [n]."""
    plan: PrivacyPlan
    schedule: tuple[ScheduledRound, ...]
    """The rounds this site takes part in."""
    secret: SecretRoot = field(repr=False)
    fingerprint: str = field(default="", repr=False)
    """Of its records: who knows all but one of them could test the last, so it never leaves the site."""
    next_round: int = 0
    """Rounds before this one are over: answered, or given up and still counted."""
    optimizer_state: OptimizerState | None = field(default=None, repr=False)

    def scheduled(self, instruction: RoundInstruction) -> ScheduledRound:
        """The round that `instruction` asks for. Spends nothing.

        Raises:
            ProtocolError: the round is not scheduled for this site, is over, or names another phase.
        """
        entry = next((entry for entry in self.schedule if entry.index == instruction.round_index), None)
        if entry is None or entry.phase != instruction.phase:
            raise ProtocolError(
                f"client {self.client} is not scheduled for round {instruction.round_index} "
                f"of phase {instruction.phase}"
            )
        if entry.index < self.next_round:
            raise ProtocolError(f"client {self.client} has already done round {entry.index}; each round is done once")
        return entry

    def admit(self, instruction: RoundInstruction) -> ScheduledRound:
        """Count the round as spent and return it; called before anything private is computed. Raises as `scheduled`."""
        entry = self.scheduled(instruction)
        self.next_round = entry.index + 1
        return entry

    def facts(self, entry: ScheduledRound) -> Facts:
        """Public facts after `entry`. Every scheduled round up to it counts, answered or not: the worst case."""
        done = [past for past in self.schedule if past.index <= entry.index]
        steps = {phase.name: sum(p.num_steps for p in done if p.phase == phase.name) for phase in self.plan.phases}
        facts = self.plan.describe(steps, spent=self._epsilon_after[entry.index])
        own = {"client": self.client, "num_examples": len(self.records), "noise_seeded": self.secret.is_seeded}
        return own | facts

    @cached_property
    def _epsilon_after(self) -> dict[int, float]:
        charges = [[self.plan[entry.phase].charge(entry.num_steps)] for entry in self.schedule]
        spent = epsilon_curve(charges, self.plan.delta, self.plan.accountant)
        return {entry.index: value for entry, value in zip(self.schedule, spent, strict=True)}
