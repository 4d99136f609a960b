"""Which client does what in which round: public, fixed before the run starts, the same for everyone."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora.config import RunConfig
from fedlora.privacy.plan import EVALUATION, FINETUNE, PROTOTYPE
from fedlora.randomness import PublicSeed


@dataclass(frozen=True)
class ScheduledRound:
    """One round: its global index from 0, its phase, who takes part, and how many steps at which rate each does."""

    index: int
    phase: str
    clients: tuple[int, ...]
    num_steps: int
    learning_rate: float = 0.0


def make_schedule(config: RunConfig) -> tuple[ScheduledRound, ...]:
    """All rounds of a run.

    The cohort of a round is drawn from the public seed, so it amplifies nothing: each client is charged for exactly the
    rounds it is scheduled in.
    """
    everyone = tuple(range(config.federation.clients))
    rounds: list[ScheduledRound] = []
    if config.model.head == "prototype":
        rounds.append(ScheduledRound(0, PROTOTYPE, everyone, 1))
    for number in range(config.federation.rounds):
        cohort = _cohort(config, everyone, number)
        rate = _learning_rate(config, number)
        rounds.append(ScheduledRound(len(rounds), FINETUNE, cohort, config.federation.local_steps, rate))
    if config.federation.private_evaluation:
        rounds.append(ScheduledRound(len(rounds), EVALUATION, everyone, 1))
    return tuple(rounds)


def _learning_rate(config: RunConfig, number: int) -> float:
    """Of fine-tuning round `number`. Falling to zero averages the noise out of the last steps."""
    rate = config.training.learning_rate
    return rate if config.training.schedule == "constant" else rate * (1 - number / config.federation.rounds)


def _cohort(config: RunConfig, everyone: tuple[int, ...], number: int) -> tuple[int, ...]:
    size = max(1, round(config.federation.participation * len(everyone)))
    if size == len(everyone):
        return everyone
    generator = PublicSeed.from_int(config.run.seed).numpy("cohort", number)
    return tuple(sorted(generator.choice(everyone, size=size, replace=False).tolist()))
