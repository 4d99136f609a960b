"""Training level: what sites without records send. It is all noise, so that it can be tested as noise.

Several sites do a run's first rounds in one `Cohort.run` each: instruction, ledger, streams, mechanism, egress are the
run's. Their plans are those of the audited site's records; then the records are taken away. Every instruction starts
from zeros and every step is a plain one of rate 1, as what the optimiser and the noise filter make of a release is
post-processing.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.slots import Slot
from fedlora.config import RunConfig
from fedlora.data.encode import encode
from fedlora.data.glue import Records
from fedlora.experiments.audit_training import LONE_SERVER, Advance, audited_rounds, without_search
from fedlora.federation.cohort import Cohort
from fedlora.federation.messages import RoundInstruction
from fedlora.federation.schedule import ScheduledRound, make_schedule
from fedlora.federation.site import Site
from fedlora.federation.sites import TrainingData, make_sites
from fedlora.federation.workbench import Workbench
from fedlora.privacy.audit.noise import ReleasedNoise
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.mechanisms.granular import grid_of
from fedlora.privacy.phases import FINETUNE
from fedlora.privacy.plan import PhasePlan

SITES, MOST_STEPS = 4, 4

_NONE = np.empty(0, np.int64)


def noise_config(config: RunConfig, num_rounds: int) -> RunConfig:
    """The recipe for `SITES` sites that do all of its `audited_rounds`, in plain steps."""
    return without_search(config).with_overrides(
        f"federation.clients={SITES}",
        "federation.participation=1.0",
        f"federation.rounds={audited_rounds(config, num_rounds)}",
        "training.optimizer=sgd",
        "training.weight_decay=0.0",
        "training.noise_filter=none",
        "adapter.rate_of_a=1.0",
        "adapter.rate_of_r=1.0",
        "federation.wire_dtype=float32",
        *LONE_SERVER,
    )


def noise_schedule(config: RunConfig) -> tuple[ScheduledRound, ...]:
    """Of a `noise_config`: rounds of rate 1 and of a few steps, enough to see a stream that starts again in each."""
    return tuple(
        dataclasses.replace(entry, num_steps=min(entry.num_steps, MOST_STEPS), learning_rate=1.0)
        for entry in make_schedule(config)
    )


def released_noise(config: RunConfig, bench: Workbench, records: Records, advance: Advance) -> list[ReleasedNoise]:
    """What `SITES` sites of no records release, phase by phase; nothing of a phase that claims no noise.

    Args:
        config: from `noise_config`.
        bench: built for the same model, adapter and engine.
        records: of the audited site, for its plan.
        advance: called with 1 after every round.
    """
    schedule = noise_schedule(config)
    data = TrainingData(records=records, parts={client: np.arange(len(records)) for client in range(SITES)})
    sites = [dataclasses.replace(site, records=_NONE, heldout=_NONE) for site in make_sites(config, data, schedule)]
    found = []
    with closing(Ledger.in_memory()) as ledger:
        cohort = Cohort(
            workbench=dataclasses.replace(bench, config=config),
            dataset=encode(records.subset(np.arange(1)), bench.classifier.tokenizer, config.data.max_length),
            sites=sites,
            ledger=ledger,
        )
        for entry in schedule:
            updates = cohort.run(_instruction(bench, entry))
            if sites[0].plan[entry.phase].mechanism.effective_noise_multiplier > 0:
                found += [
                    _standardised(update.vector, site, entry, config, bench)
                    for site, update in zip(sites, updates, strict=True)
                ]
            advance(1)
    return found


def _instruction(bench: Workbench, entry: ScheduledRound) -> RoundInstruction:
    return RoundInstruction(
        run_id="audit",
        round_index=entry.index,
        phase=entry.phase,
        layout_digest=bench.sent_layout(entry).digest,
        theta=torch.zeros(bench.global_size(entry.phase)),
    )


def _standardised(
    vector: Tensor, site: Site, entry: ScheduledRound, config: RunConfig, bench: Workbench
) -> ReleasedNoise:
    """`vector` [S] float32 in units of the charged standard deviation of a sum of one noise for each step that trains
    a number.

    Every sound mechanism here has the same noise in all directions, so that the charged one is that of each.
    """
    phase = site.plan[entry.phase]
    slots = bench.sent_layout(entry).slots
    std = phase.charge().noise_multiplier * phase.sensitivity
    steps = np.concatenate([np.full(slot.size, _steps(entry, slot)) for slot in slots])
    divisor = config.training.expected_batch_size if entry.phase == FINETUNE else 1
    return ReleasedNoise(
        phase=entry.phase,
        client=site.client,
        round_index=entry.index,
        values=vector.double().numpy() * (divisor / std) / np.sqrt(steps),
        rank=_rank(phase, [slot.size for slot in slots]),
        widening=_widening(phase, _largest_release(bench, entry)),
    )


def _steps(entry: ScheduledRound, slot: Slot) -> int:
    """How many of the round's noises a slot that is sent has in it."""
    if not entry.turns:
        return entry.num_steps
    turns = (entry.turns[number % len(entry.turns)] for number in range(entry.num_steps))
    return sum(slot.part in turn.parts for turn in turns)


def _largest_release(bench: Workbench, entry: ScheduledRound) -> int:
    """Numbers in it, also those that a site keeps."""
    released = bench.payload_layout(entry.phase)
    return max((released.only(turn.parts).size for turn in entry.turns), default=released.size)


def _rank(phase: PhasePlan, slot_sizes: list[int]) -> int:
    """Dimension of what the phase's projection keeps: its trace, which for a circulant is its first entry, P times."""
    if phase.projection is None:
        return sum(slot_sizes)
    units = [torch.eye(1, size, dtype=torch.float64) for size in slot_sizes]
    return sum(round(size * float(phase.projection(unit)[0, 0])) for size, unit in zip(slot_sizes, units, strict=True))


def _widening(phase: PhasePlan, size: int) -> float:
    """By which a release on a grid is wider than charged, for the rounding (`release_on_grid`)."""
    grid = grid_of(phase.mechanism.noise_multiplier * phase.sensitivity)
    return 1 + grid * math.sqrt(size) / phase.sensitivity
