"""How long a run takes, from how fast this machine is and what the run computes on.

Most of it goes into per-record gradients, in micro-batches of fixed shapes (`engine.batching`): the padded tokens of a
step follow from the lengths of the records. Prototypes and evaluations are counted in the same way. What is left is a
constant for a run, a round and a record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset, encode
from fedlora.data.glue import available_validation_splits
from fedlora.engine.batching import AgreeingRows, Shapes, microbatches
from fedlora.engine.execution import choose_execution
from fedlora.experiments.sweeps.speed import Speed
from fedlora.federation.schedule import ScheduledRound, make_schedule
from fedlora.federation.shelf import Shelf
from fedlora.privacy.phases import ALIGNMENT, BILEVEL, EVALUATION, FINETUNE, PROTOTYPE
from fedlora.randomness import PublicSeed

# Measured on a machine of four shared cores with the quickstart's model.
PROCESS_SECONDS = 8.0  # of a process that begins: imports, base model
_RUN_SECONDS = 2.0  # pricing, adapter, pictures
_ROUND_SECONDS = 0.05  # ledger, checkpoint
_RECORD_SECONDS = 1.5e-4  # tokens, fingerprint

_DRAWS = 32  # of a batch, to find out how it is padded
_SAMPLE = 4096  # records whose lengths stand for those of all


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run computes on, as far as it takes time.

    Attributes:
        records: of training, over all clients.
        lengths: tokens of a sample of them, int64.
        longest: tokens that the model can take.
        validation_records: over all splits.
        validation_tokens: padded, of one evaluation.
        token_budget: of a micro-batch.
    """

    records: int
    lengths: np.ndarray
    longest: int
    validation_records: int
    validation_tokens: int
    token_budget: int


def workload_of(config: RunConfig, shelf: Shelf) -> Workload:
    """Sizes and lengths of the records that the run would use.

    Raises:
        DataError: they cannot be found.
        ModelError: the model, whose tokens are counted, is not there.
    """
    execution = choose_execution(config)
    classifier = shelf.classifier(config, execution)
    records = shelf.records(config, "train")
    chosen = np.unique(np.linspace(0, len(records) - 1, _SAMPLE).astype(np.int64))
    sample = encode(records.subset(chosen), classifier.tokenizer, config.data.max_length)
    splits = [
        shelf.encoded(config, split, classifier)
        for split in available_validation_splits(config.data.task, config.data.source)
    ]
    return Workload(
        records=len(records),
        lengths=sample.lengths,
        longest=sample.longest,
        validation_records=sum(map(len, splits)),
        validation_tokens=sum(_padded(split, execution.token_budget) for split in splits),
        token_budget=execution.token_budget,
    )


def run_seconds(config: RunConfig, speed: Speed, workload: Workload, sizes: Sequence[int]) -> float:
    """Of one run in a process that has begun.

    Args:
        config: of the run.
        speed: of this machine with it.
        workload: its records.
        sizes: n of each client.
    """
    schedule = make_schedule(config)
    prepared = (workload.records + workload.validation_records) * _RECORD_SECONDS
    evaluations = sum(_is_evaluated(entry, schedule, config) for entry in schedule)
    rounds = _Rounds(config, speed, workload, sizes)
    return (
        _RUN_SECONDS
        + speed.start * (1 if config.adapter.select == "none" else 2)
        + prepared
        + evaluations * workload.validation_tokens * speed.forward_token
        + sum(_ROUND_SECONDS + rounds.seconds(entry) for entry in schedule)
    )


class _Rounds:
    """What the clients of a round compute."""

    def __init__(self, config: RunConfig, speed: Speed, workload: Workload, sizes: Sequence[int]) -> None:
        self._config, self._speed, self._workload, self._sizes = config, speed, workload, sizes
        self._of_batch: dict[tuple[float, bool], tuple[float, float]] = {}

    def seconds(self, entry: ScheduledRound) -> float:
        config = self._config
        held_out = config.data.heldout_share if config.federation.private_evaluation else 0.0
        trained = [self._sizes[client] * (1 - held_out) for client in entry.clients]
        if entry.phase == PROTOTYPE:
            return sum(map(self._forward, trained))
        if entry.phase == EVALUATION:
            return sum(self._forward(self._sizes[client] * held_out) for client in entry.clients)
        if entry.phase == ALIGNMENT:
            return sum(self._gradients(min(size, config.adapter.alignment_records)) for size in trained)
        step = self._step(
            len(trained), config.training.expected_batch_size * (1 - held_out), self._share_of_slots(entry)
        )
        return entry.num_steps * step * (2 if entry.phase == BILEVEL else 1)  # weights and gates in turn

    def _step(self, clients: int, batch: float, share_of_slots: float) -> float:
        """The records of all clients share micro-batches where the back end can do that."""
        together = clients if self._config.engine.backend == "expanded" else 1
        gradients = self._gradients(together * batch, share_of_slots) * (clients // together)
        noisy = math.isfinite(self._config.privacy.epsilon)
        return gradients + (clients * self._speed.release if noisy else 0.0)

    def _share_of_slots(self, entry: ScheduledRound) -> float:
        """Of those that were measured: fine-tuning has only the chosen ones, or one for all others of a type."""
        adapter = self._config.adapter
        chosen = entry.phase == FINETUNE and adapter.select not in ("none", "all", "mask")
        return adapter.ratio if chosen and adapter.sharing == "none" else 1.0

    def _gradients(self, count: float, share_of_slots: float = 1.0) -> float:
        tokens, rows = self._shape(count, agreeing=lambda _columns, counts, *_: counts)
        return tokens * self._speed.gradient_token + rows * self._speed.gradient_row * share_of_slots

    def _forward(self, count: float) -> float:
        return self._shape(count, agreeing=None)[0] * self._speed.forward_token

    def _shape(self, count: float, *, agreeing: AgreeingRows | None) -> tuple[float, float]:
        """Padded tokens and rows of the micro-batches of a Poisson draw of `count` records, on average.

        Of gradients as if smaller micro-batches always agreed with full ones: a little too few where they do not.
        """
        key = count, agreeing is None
        if key not in self._of_batch:
            cuts = Shapes(self._workload.token_budget, agreeing)
            draw, found = PublicSeed.from_int(0).numpy("forecast", str(count)), []
            for _ in range(_DRAWS if count < _SAMPLE else 1):
                lengths = draw.choice(self._workload.lengths, draw.poisson(count))
                expected = math.inf if agreeing is None else count
                shapes = [*cuts.cut(lengths, self._workload.longest, expected=expected)]
                found.append((sum(shape.rows * shape.columns for shape in shapes), sum(shape.rows for shape in shapes)))
            tokens, rows = np.mean(found, axis=0)
            self._of_batch[key] = float(tokens), float(rows)
        return self._of_batch[key]


def _is_evaluated(entry: ScheduledRound, schedule: Sequence[ScheduledRound], config: RunConfig) -> bool:
    """Whether the server looks at public validation data after a round, as `Server` decides it."""
    if entry.phase in (EVALUATION, ALIGNMENT, BILEVEL):
        return False
    last = not any(later.phase == FINETUNE for later in schedule[entry.index + 1 :])
    return last or entry.phase == PROTOTYPE or (entry.index + 1) % config.run.evaluate_every == 0


def _padded(dataset: EncodedDataset, token_budget: int) -> int:
    return sum(len(group) * int(dataset.lengths[group].max()) for group in microbatches(dataset.lengths, token_budget))
