"""record.json's key "slots": how far training moved each slot, and how much of that noise alone would have done.

Post-processing, so it costs no privacy: made of the global theta that was released, of the layout, of the public
schedule and of facts that clients told. No site's own theta, sum or gradient is seen here.

With plain SGD noise enters theta linearly. A round with learning rate η and s local steps, answered by K clients whose
releases have noise of standard deviation σ_k on each number of a sum, adds to each number of the mean an independent
normal value of variance s · (η / (K B))² · Σ σ_k², with B the expected batch size and s those of the steps that train
it. What follows leaves it as it is, so the expected squared norm of a slot's noise is the sum of these over rounds,
times the slot's numbers.

What noise does by leading gradients elsewhere is not in it: that is part of what was learnt, or failed to be.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fedlora.config import RunConfig
from fedlora.config.sections import FederationConfig
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
    """Type of that module, such as query; None as above. Both factors of a module have its layer and type."""
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
    modules = {candidate.module: candidate for candidate in workbench.candidates}
    warm = {slot.name for slot in workbench.full_layout.slots} if config.adapter.warm_start else set()
    moved = theta.double() - workbench.initial_theta.to("cpu").double()
    slots = []
    for slot in layout.slots:
        variance = variances[FINETUNE][slot.part] + (variances[WARMUP][slot.part] if slot.name in warm else 0.0)
        module = modules.get(slot.name.rpartition("/")[0])
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
    training, adapter, federation = config.training, config.adapter, config.federation
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
    if adapter.method in _REMADE:
        return f"adapter.method = {adapter.method} makes other factors of the clients' products"
    if adapter.ranks:
        return f"adapter.ranks = {adapter.ranks}: clients of a smaller rank add noise to fewer numbers"
    plain = FederationConfig()
    for key in ("aggregator", "weights", "server_optimizer", "wire_dtype"):
        if (value := getattr(federation, key)) != getattr(plain, key):
            return f"federation.{key} = {value} makes something else than the plain mean of what sites have noised"
    return ""


_REMADE = ("ffa_svd", "fed_sb_svd", "flora", "flexlora")
"""Methods whose server leaves no factor as the mean of the clients' factors."""


def _note(config: RunConfig) -> str:
    """What to know of the numbers."""
    if config.adapter.select in ("warmup", "alignment") and config.adapter.warm_start and config.private:
        return (
            "modules were chosen by scores in which the warm-up's noise is; noise_energy is its mean before the choice"
        )
    if config.adapter.method == "fedex":
        return "what fedex adds to the base model, products of noise among it, is in no slot"
    if config.adapter.method == "fedsa":
        return "what sites keep under fedsa is in no slot"
    return ""


def _variances(
    config: RunConfig,
    workbench: Workbench,
    clients: Sequence[Mapping[str, Any]],
    rounds: Sequence[Mapping[str, Any]],
) -> dict[str, defaultdict[str, float]]:
    """Of the noise on each number of theta that all rounds of a phase have left there, by phase and part of theta.

    A low-pass projection keeps this much in each direction of its subspace.
    """
    known = {facts["client"]: facts for facts in clients}
    variances: dict[str, defaultdict[str, float]] = {WARMUP: defaultdict(float), FINETUNE: defaultdict(float)}
    for index, answered in who_answered(workbench.schedule, rounds).items():
        entry = workbench.schedule[index]
        if entry.phase in variances and answered:
            share = entry.learning_rate / (len(answered) * config.training.expected_batch_size)
            division = workbench.division(entry)
            for place, turn in enumerate(division.turns):
                size = workbench.payload_layout(entry.phase).only(turn.parts).size
                total = math.fsum(_noise_std(known[client], size) ** 2 for client in answered)
                steps = len(range(place, entry.num_steps, len(division.turns)))
                for part in set(turn.parts) - set(workbench.method.local):
                    rate = division.rates.get(part, 1.0)
                    variances[entry.phase][part] += steps * (share * rate) ** 2 * total
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
