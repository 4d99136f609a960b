"""record.json's key "slots": how far training moved each slot, and how much of that noise alone would have done.

Post-processing, so it costs no privacy: made of the global theta that was released, of the layout, of the public
schedule and of facts that clients told. No site's own theta, sum or gradient is seen here.

With plain SGD noise enters theta linearly. A round with learning rate η and s local steps, answered by K clients whose
releases have noise of standard deviation σ_k on each number of a sum, adds to each number of the mean an independent
normal value of variance s · (η / (K B))² · Σ σ_k², with B the expected batch size. What follows leaves it as it is, so
the expected squared norm of a slot's noise is the sum of these over rounds, times the slot's numbers.

What noise does by leading gradients elsewhere is not in it: that is part of what was learnt, or failed to be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fedlora.config import RunConfig
from fedlora.experiments.privacy_facts import who_answered
from fedlora.federation.workbench import Workbench
from fedlora.privacy.mechanisms.granular import released_std
from fedlora.privacy.phases import FINETUNE, WARMUP
from fedlora.privacy.projection import LowPass


@dataclass(frozen=True, kw_only=True)
class SlotEnergy:
    """Of one slot of the layout that a run ended with."""

    name: str
    layer: int | None
    """Of the module it adapts; None for a head's, and for an adapter that modules share."""
    kind: str | None
    """Type of that module, such as query; None as above."""
    energy: float
    """Squared L2 norm of what training made of it less its initial value."""
    noise_energy: float
    """Expectation of the same if the noise that was released had been all that moved it."""


def slot_facts(
    config: RunConfig,
    workbench: Workbench,
    *,
    theta: Tensor,
    clients: Sequence[Mapping[str, Any]],
    rounds: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The record's `slots` (one `SlotEnergy` each, None where the noise has no exact expectation) and `slots_note`.

    Args:
        config: of the run.
        workbench: adapts what the run ended with.
        theta: [P] the released global state at the end.
        clients: public facts of every client that was asked for anything.
        rounds: lines of rounds.jsonl; a round that was given up has none, and moved nothing.
    """
    if reason := _not_exact(config):
        return {"slots": None, "slots_note": f"the energy of noise has no exact expectation: {reason}"}
    variances = _variances(config, workbench, clients, rounds)
    layout, kept = workbench.layout, LowPass(config.privacy.low_pass)
    modules = {f"{candidate.module}/B": candidate for candidate in workbench.candidates}
    warm = {slot.name for slot in workbench.full_layout.slots} if config.adapter.warm_start else set()
    moved = theta.double() - workbench.initial_theta.to("cpu").double()
    slots = []
    for slot in layout.slots:
        variance = variances[FINETUNE] + (variances[WARMUP] if slot.name in warm else 0.0)
        module = modules.get(slot.name)
        energy = SlotEnergy(
            name=slot.name,
            layer=None if module is None else module.layer,
            kind=None if module is None else module.kind,
            energy=float(layout.view(moved, slot).square().sum()),
            noise_energy=variance * kept.dimension(slot.size),
        )
        slots.append(asdict(energy))
    return {"slots": slots, "slots_note": _note(config)}


def _not_exact(config: RunConfig) -> str:
    """Why the noise in theta is not a sum of independent normal values of known variance; empty where it is."""
    training, adapter = config.training, config.adapter
    if math.isinf(config.privacy.epsilon):
        return ""  # no noise, whatever is made of it
    if config.privacy.unit == "client":
        return "privacy.unit = client adds noise to moves, not to gradients"
    if config.unsound:
        return "privacy.gredp_noise = real has noise of other strength in every direction"
    if training.optimizer != "sgd":
        return f"training.optimizer = {training.optimizer} does not add up noised gradients as they are"
    if training.weight_decay:
        return f"training.weight_decay = {training.weight_decay:g} shrinks earlier noise"
    if training.noise_filter != "none":
        return f"training.noise_filter = {training.noise_filter} changes the noise"
    if adapter.select == "bilevel" and adapter.warm_start:
        return "adapter.select = bilevel scales earlier noise by gates that are learnt with it"
    return ""


def _note(config: RunConfig) -> str:
    """What to know of the numbers."""
    if config.adapter.select in ("warmup", "alignment") and config.adapter.warm_start and config.private:
        return (
            "modules were chosen by scores in which the warm-up's noise is; noise_energy is its mean before the choice"
        )
    return ""


def _variances(
    config: RunConfig,
    workbench: Workbench,
    clients: Sequence[Mapping[str, Any]],
    rounds: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """Of the noise on each number of theta that all rounds of a phase have left there, by phase.

    A low-pass projection keeps this much in each direction of its subspace.
    """
    known = {facts["client"]: facts for facts in clients}
    variances = {WARMUP: 0.0, FINETUNE: 0.0}
    for index, answered in who_answered(workbench.schedule, rounds).items():
        entry = workbench.schedule[index]
        if entry.phase in variances and answered:
            size = workbench.payload_layout(entry.phase).size
            share = entry.learning_rate / (len(answered) * config.training.expected_batch_size)
            stds = [_noise_std(known[client], size) for client in answered]
            variances[entry.phase] += entry.num_steps * share**2 * math.fsum(std**2 for std in stds)
    return variances


def _noise_std(facts: Mapping[str, Any], size: int) -> float:
    """Of a client's noise on each of the `size` numbers of a released sum.

    Sound mechanisms declare a multiple of the identity, so that their weakest direction is every direction.
    """
    nominal, effective = facts["noise_multiplier"], facts["effective_noise_multiplier"]
    if nominal == 0:
        return 0.0
    on_grid = released_std(noise_multiplier=nominal, sensitivity=facts["clip_norm"], size=size)
    return float(on_grid * effective / nominal)
