"""A site's own view of a run: its records, its plan, its secret, and what it has spent.

The server asks; the site looks into its own copy of the public schedule and does each of its rounds once, in order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from fedlora.engine.training import OptimizerState
from fedlora.errors import ProtocolError, RoundRepeated
from fedlora.federation.messages import Facts, RoundInstruction
from fedlora.federation.schedule import ScheduledRound
from fedlora.privacy.accounting import Charge, epsilon_curve
from fedlora.privacy.ledger import Cap, DataSet, Request
from fedlora.privacy.plan import PrivacyPlan
from fedlora.randomness import SecretRoot


@dataclass(kw_only=True)
class Site:
    """One data owner in one run."""

    client: int
    records: np.ndarray = field(repr=False)
    """Positions in the data set at hand of the records it trains on, int64."""
    plan: PrivacyPlan
    schedule: tuple[ScheduledRound, ...]
    """The rounds this site takes part in."""
    secret: SecretRoot = field(repr=False)
    data_set: DataSet = field(repr=False)
    """Whose budget it spends."""
    fingerprint: str = field(default="", repr=False)
    """Of its records. Who knows all of them but one could test the last by it: it never leaves."""
    heldout: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    """Positions of those it keeps from training for the evaluation. How many they are is private; n counts both."""
    cap: Cap | None = None
    """The most that all runs on these records may spend; None in a simulation, where the plan is the only limit, and
    where clients are protected, which a policy allows by name and which promises records nothing."""
    policy_digest: str | None = None
    """Of the policy that it obeys, `SitePolicy.digest`."""
    public_size: int | None = None
    """The number of records, held-out ones among them, where it may be told."""
    run_id: str | None = None
    """The run that it takes part in, once it has done a round of it."""
    next_round: int = 0
    """Rounds before this one are over: answered, or given up and still counted."""
    optimizer_state: OptimizerState | None = field(default=None, repr=False)
    kept: Tensor | None = field(default=None, repr=False)
    """What a method has the site keep of its last trained vector [P]: noised as all of it, and never sent."""
    gate_records: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    """Those of `records` that teach the gates of a bilevel search; the rest teaches its weights. A private number."""
    mask: tuple[bool, ...] | None = None
    """Which candidates were chosen, once it was told: one choice for the whole run."""

    def scheduled(self, instruction: RoundInstruction) -> ScheduledRound:
        """The round that `instruction` asks for. Spends nothing.

        Raises:
            ProtocolError: the round is of another run, not scheduled for this site, names another phase, or another
                choice of modules than an earlier one.
            RoundRepeated: it is over.
        """
        if self.run_id not in (None, instruction.run_id):
            raise ProtocolError(f"client {self.client} takes part in another run, and only in that")
        place = self._place(instruction.round_index)
        entry = self.schedule[place] if place < len(self.schedule) else None
        if entry is None or (entry.index, entry.phase) != (instruction.round_index, instruction.phase):
            raise ProtocolError(
                f"client {self.client} is not scheduled for round {instruction.round_index} "
                f"of phase {instruction.phase}"
            )
        if entry.index < self.next_round:
            raise RoundRepeated(f"client {self.client} has already done round {entry.index}; each round is done once")
        if self.mask not in (None, instruction.mask):
            raise ProtocolError(f"client {self.client} was told of another choice of modules; there is one for a run")
        return entry

    def request(self, instruction: RoundInstruction) -> Request:
        """What the ledger has to grant before the round: its cost, with what the rest of the run will cost in view.

        Raises:
            ProtocolError: as `scheduled`.
        """
        this = self.scheduled(instruction)
        later = self._steps[-1] - self._steps[self._place(this.index) + 1]
        return Request(
            data_set=self.data_set,
            charge=self._charge(this.phase, this.num_steps),
            outlook=tuple(
                self._charge(phase.name, int(steps))
                for phase, steps in zip(self.plan.phases, later, strict=True)
                if steps
            ),
            run=instruction.run_id,
            round_index=this.index,
            purpose=this.phase,
            cap=self.cap,
        )

    def planned_charges(self) -> list[Charge]:
        """What all its scheduled rounds will be charged."""
        return [self._charge(entry.phase, entry.num_steps) for entry in self.schedule]

    def _charge(self, phase: str, num_steps: int) -> Charge:
        """Noise that anyone can repeat protects nothing, whatever the plan says.

        Nor does noise on the sum of clients' moves protect this site's records from the server, which gets the move;
        an owner's ledger tells of records.
        """
        charge = self.plan[phase].charge(num_steps)
        exposed = self.policy_digest is not None and self.plan.unit == "client"
        return replace(charge, noise_multiplier=0.0) if self.secret.is_seeded or exposed else charge

    def admit(self, instruction: RoundInstruction) -> ScheduledRound:
        """Count the round as over and return it; called when it is charged, before anything private is computed.

        Raises:
            ProtocolError: as `scheduled`.
        """
        entry = self.scheduled(instruction)
        self.run_id, self.next_round = instruction.run_id, entry.index + 1
        if instruction.mask != self.mask:
            self.mask, self.optimizer_state = instruction.mask, None  # of modules that are trained no longer
        return entry

    def facts(self, entry: ScheduledRound) -> Facts:
        """Public facts after `entry`. Every scheduled round up to it counts, answered or not: the worst case."""
        place = self._place(entry.index)
        done = zip(self.plan.phases, self._steps[place + 1], strict=True)
        facts = self.plan.describe({phase.name: int(steps) for phase, steps in done}, spent=self._spent[place])
        size = {} if self.public_size is None else {"num_examples": self.public_size}
        return {"client": self.client, **size, "noise_seeded": self.secret.is_seeded} | facts

    @property
    def weight_records(self) -> np.ndarray:
        """Those that teach the weights of a bilevel search."""
        return np.setdiff1d(self.records, self.gate_records)

    def _place(self, index: int) -> int:
        """Where the first scheduled round not before `index` stands in the schedule, which is in order."""
        return bisect_left(self.schedule, index, key=lambda entry: entry.index)

    @cached_property
    def _steps(self) -> np.ndarray:
        """Private steps of each phase in the rounds before each place, int64 [rounds + 1, phases].

        Asked for in every round of every site: a walk over the schedule each time would make long runs quadratic.
        """
        names = [phase.name for phase in self.plan.phases]
        steps = np.zeros((len(self.schedule) + 1, len(names)), np.int64)
        for place, entry in enumerate(self.schedule, 1):
            steps[place, names.index(entry.phase)] = entry.num_steps
        return steps.cumsum(axis=0)

    @cached_property
    def _spent(self) -> Sequence[float]:
        """ε after each scheduled round."""
        charges = [[self.plan[entry.phase].charge(entry.num_steps)] for entry in self.schedule]
        return epsilon_curve(charges, self.plan.delta, self.plan.accountant)
