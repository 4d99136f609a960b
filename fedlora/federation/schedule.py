"""Which client does what in which round: public, fixed before the run starts, the same for everyone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fedlora.adapters.methods.method import Turn, method_of
from fedlora.config import RunConfig
from fedlora.privacy.phases import ALIGNMENT, BILEVEL, EVALUATION, FINETUNE, PROTOTYPE, WARMUP
from fedlora.randomness import PublicSeed

Turns = tuple[Turn, ...]


@dataclass(frozen=True)
class ScheduledRound:
    """One round: its global index from 0, its phase, who takes part, and how many steps at which rate each does."""

    index: int
    phase: str
    clients: tuple[int, ...]
    num_steps: int
    learning_rate: float = 0.0
    turns: Turns = ()
    """What steps of fine-tuning train, in turn."""


def make_schedule(config: RunConfig) -> tuple[ScheduledRound, ...]:
    """All rounds of a run.

    The cohort of a round is drawn from the public seed, so it amplifies nothing: each client is charged for exactly the
    rounds it is scheduled in.
    """
    federation, everyone = config.federation, tuple(range(config.federation.clients))
    rounds: list[ScheduledRound] = []

    def add(phase: str, clients: tuple[int, ...], num_steps: int, rate: float = 0.0, turns: Turns = ()) -> None:
        rounds.append(ScheduledRound(len(rounds), phase, clients, num_steps, rate, turns))

    if config.model.head == "prototype":
        add(PROTOTYPE, everyone, 1)
    searched = config.warmup_rounds + config.search_rounds
    method, head = method_of(config.adapter), config.model.head == "trained"
    for number in range(federation.rounds):
        phase = WARMUP if number < config.warmup_rounds else BILEVEL if number < searched else FINETUNE
        turns = method.turns(number - searched, head=head) if phase == FINETUNE else ()
        add(phase, _cohort(config, everyone, number), federation.local_steps, _learning_rate(config, number), turns)
        if config.adapter.select == "alignment" and number + 1 == searched:
            add(ALIGNMENT, everyone, 1)
    if federation.private_evaluation:
        add(EVALUATION, everyone, 1)
    return tuple(rounds)


def planned_steps(schedule: Iterable[ScheduledRound], client: int) -> dict[str, int]:
    """Private steps of `client` by phase."""
    steps: Counter[str] = Counter()
    for entry in schedule:
        if client in entry.clients:
            steps[entry.phase] += entry.num_steps
    return dict(steps)


def _learning_rate(config: RunConfig, number: int) -> float:
    """Of training round `number`. Falling to zero averages the noise out of the last steps."""
    rate = config.training.learning_rate
    return rate if config.training.schedule == "constant" else rate * (1 - number / config.federation.rounds)


def _cohort(config: RunConfig, everyone: tuple[int, ...], number: int) -> tuple[int, ...]:
    size = config.federation.cohort_size
    if size == len(everyone):
        return everyone
    generator = PublicSeed.from_int(config.run.seed).numpy("cohort", number)
    return tuple(sorted(generator.choice(everyone, size=size, replace=False).tolist()))
