"""record.json's key "privacy": what the report on a run's privacy says, as numbers and names. All of it is public.

Nothing here names a fingerprint, a place on a disk, or a number of records that a site keeps to itself.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedlora.adapters.slots import AdapterLayout
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.federation.quantisation import slot_bytes, wire_dtype
from fedlora.federation.schedule import ScheduledRound
from fedlora.federation.site import Site
from fedlora.federation.workbench import Workbench
from fedlora.privacy.accounting import Charge, epsilon
from fedlora.privacy.egress import FACTS, PHASE_FACTS, Fact
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.ledger_file import ABANDONED, RESERVED, SPENT, Entry
from fedlora.privacy.phases import TRAINING
from fedlora.privacy.units import Guarantee

NO_POLICY, POLICY, SITES = "none", "policy", "sites"
"""Whose rules the sites obeyed: nobody's (a simulation), one policy, or each its own, which the server does not see."""

Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """Whether a run was stopped and went on, and what that cost."""

    resumed: bool
    done_anew: Mapping[int, Sequence[tuple[str, int]]]
    """Phase and steps of every round that was charged to a site, by client, and then done anew."""


def privacy_facts(
    config: RunConfig,
    workbench: Workbench,
    *,
    clients: Sequence[Mapping[str, Any]],
    rounds: Sequence[Mapping[str, Any]],
    oversight: Facts,
    resumption: Resumption,
) -> Facts:
    """All that `privacy_report` needs beside the rest of the record.

    Args:
        clients: public facts of every client that was asked for anything.
        rounds: lines of rounds.jsonl.
        oversight: `oversight_facts`.
        resumption: `resumption_of`.
    """
    worst = max(clients, key=lambda facts: float(facts["epsilon"]))
    answered = who_answered(workbench.schedule, rounds)
    return {
        "guarantee": asdict(Guarantee.from_config(config, epsilon=worst["epsilon"])),
        "worst_client": worst["client"],
        "noise_source": _noise_source(config),
        "cohort_size": config.federation.cohort_size,
        "less_noise": less_noise(config, worst),
        "resumed": resumption.resumed,
        "sites": [
            _site(facts, workbench.schedule, answered, resumption.done_anew.get(facts["client"], ()))
            for facts in clients
        ],
        "vectors_out": _vectors_out(workbench, answered),
        "facts_out": _facts_out(clients),
        **oversight,
    }


def _noise_source(config: RunConfig) -> str:
    """The noise on whole moves is one draw a round: always the host's."""
    if config.privacy.seeded_noise:
        return "seeded"
    return config.engine.noise if config.privacy.unit == "record" else "host"


def less_noise(config: RunConfig, worst: Mapping[str, Any]) -> dict[str, float] | None:
    """ε against who knows more of shared noise than one part: the server, that of each client alone."""
    if config.privacy.unit == "record" or config.privacy.client_noise == "server":
        return None
    rounds, asked = worst["num_steps"], config.federation.cohort_size
    told = worst.get("effective_noise_multiplier")  # not by a client that never answered
    if not told or config.privacy.seeded_noise:
        return {"server": math.inf}
    of_part = Charge(1.0, told / math.sqrt(asked - 1), rounds)
    return {"server": _priced((of_part,), worst["delta"], worst["accountant"])}


def oversight_facts(ledger: Ledger | None, run_id: str, sites: Sequence[Site], *, own_ledger: bool) -> Facts:
    """Under whose rules the sites took part, and what the ledger says where the run keeps it itself.

    Args:
        ledger: None where sites live elsewhere.
        own_ledger: it lies in the run folder, as it does without a policy. What a policy's ledger says is its owner's.
    """
    if ledger is None:
        return {"enforced": SITES, "policy": None, "ledger": None}
    if not own_ledger:
        return {"enforced": POLICY, "policy": _policy(sites), "ledger": None}
    return {"enforced": NO_POLICY, "policy": None, "ledger": _ledger(ledger, run_id, sites)}


def _policy(sites: Sequence[Site]) -> Facts | None:
    """Which policy it was, and its cap where it has one for the run.

    Not its ledger's head: made of fingerprints, it tells of records.
    """
    for site in sites:  # one policy for all of them
        if site.policy_digest is not None:
            cap = {} if site.cap is None else {"max_epsilon": site.cap.epsilon, "max_delta": site.cap.delta}
            return {"digest": site.policy_digest} | cap
    return None


def _ledger(ledger: Ledger, run_id: str, sites: Sequence[Site]) -> list[Facts]:
    """Per site of a simulation: rounds that may have been released, others by how they ended; ε of everything."""
    entries, found = ledger.entries(), []
    ended = _ended(entries)
    for site in sites:
        states: Counter[str] = Counter()
        for entry in _charged(entries, run_id, site):
            kinds = ended.get(entry.id, set())  # what may have left stays so, though the round was done anew
            states[SPENT if SPENT in kinds else ABANDONED if ABANDONED in kinds else RESERVED] += 1
        charges = tuple(ledger.charges(site.data_set))
        spent = _priced(charges, site.plan.delta, site.plan.accountant)
        counts = {state: states[state] for state in (SPENT, RESERVED, ABANDONED)}
        found.append({"client": site.client, **counts, "epsilon": spent})
    return found


def _charged(entries: Sequence[Entry], run_id: str, site: Site) -> list[Entry]:
    """What one run was charged for a site's records."""
    owner = site.data_set
    return [
        entry
        for entry in entries
        if entry.kind == RESERVED
        and (entry.run, entry.data_set, entry.fingerprint) == (run_id, owner.name, owner.fingerprint)
    ]


def _ended(entries: Sequence[Entry]) -> dict[int, set[str]]:
    """Kinds of the rows that end a reservation, by its number."""
    ended: dict[int, set[str]] = {}
    for entry in entries:
        if entry.reservation is not None:
            ended.setdefault(entry.reservation, set()).add(entry.kind)
    return ended


def resumption_of(ledger: Ledger | None, run_id: str, sites: Sequence[Site], *, resumed: bool) -> Resumption:
    """What the `ledger` of the sites in this process tells of stops; sites elsewhere do no round anew."""
    anew: dict[int, list[tuple[str, int]]] = {}
    if ledger is not None and resumed:
        entries = ledger.entries()
        ended = _ended(entries)
        for site in sites:
            lost = [entry for entry in _charged(entries, run_id, site) if ABANDONED in ended.get(entry.id, ())]
            anew[site.client] = [(entry.purpose or "", entry.num_steps or 0) for entry in lost]
    return Resumption(resumed=resumed, done_anew=anew)


def _site(
    facts: Mapping[str, Any],
    schedule: Sequence[ScheduledRound],
    answered: Mapping[int, set[int]],
    anew: Sequence[tuple[str, int]],
) -> Facts:
    """What one site spent, phase by phase. A site that never answered has not told its phases."""
    client = facts["client"]
    asked = sum(client in entry.clients for entry in schedule)
    phases = [
        {
            "name": phase["name"],
            "noise_multiplier": _nominal(facts, phase),
            "epsilon_alone": epsilon_alone(phase, facts),
        }
        for phase in facts.get("phases", ())
    ]
    return {
        "client": client,
        "rounds_asked": asked,
        "rounds_charged": asked + len(anew),
        "epsilon_charged": _epsilon_charged(facts, anew),
        "rounds_answered": sum(client in clients for clients in answered.values()),
        "phases": phases,
    }


def _epsilon_charged(facts: Mapping[str, Any], anew: Sequence[tuple[str, int]]) -> float:
    """ε of all rounds that a site was asked for, and of those that it was charged for and did anew."""
    if not anew:
        return float(facts["epsilon"])
    charges = []
    for phase in facts["phases"]:
        steps = phase["num_steps"] + sum(lost for name, lost in anew if name == phase["name"])
        charges.append(Charge(phase["sampling_probability"], phase["effective_noise_multiplier"], steps))
    return _priced(tuple(charges), facts["delta"], facts["accountant"])


def _nominal(facts: Mapping[str, Any], phase: Mapping[str, Any]) -> float:
    """The σ of the mechanism's own description. All training has one; other releases are Gaussian: both are one."""
    nominal: float = facts["noise_multiplier"] if phase["name"] in TRAINING else phase["effective_noise_multiplier"]
    return nominal


def epsilon_alone(phase: Mapping[str, Any], facts: Mapping[str, Any]) -> float:
    """ε of a phase as if it had been the only one; numbers that no accountant can price promise nothing."""
    try:
        charge = Charge(phase["sampling_probability"], phase["effective_noise_multiplier"], phase["num_steps"])
        return _priced((charge,), facts["delta"], facts["accountant"])
    except ConfigError:
        return math.inf


@functools.lru_cache(maxsize=1024)
def _priced(charges: tuple[Charge, ...], delta: float, accountant: str) -> float:
    """Sites of one size have one plan: each is priced once."""
    return epsilon(charges, delta, accountant)


def who_answered(schedule: Sequence[ScheduledRound], rounds: Sequence[Mapping[str, Any]]) -> dict[int, set[int]]:
    """Clients whose update arrived, by round; failures have a client's number as a key, which JSON makes a text."""
    return {
        line["round"]: {client for client in schedule[line["round"]].clients if str(client) not in line["failures"]}
        for line in rounds
    }


def _vectors_out(workbench: Workbench, answered: Mapping[int, set[int]]) -> list[Facts]:
    """Every kind of vector that left a site, slot by slot."""
    updates: Counter[tuple[str, AdapterLayout]] = Counter()
    for index, clients in answered.items():
        entry = workbench.schedule[index]
        updates.update((entry.phase, workbench.sent_layout(entry, client)) for client in clients)
    found = []
    for (phase, layout), count in updates.items():
        dtype = wire_dtype(workbench.config, phase)
        sizes = [slot_bytes(slot, dtype) for slot in layout.slots]
        slots = [
            {"name": slot.name, "shape": list(slot.shape), "bytes": size}
            for slot, size in zip(layout.slots, sizes, strict=True)
        ]
        found.append({"phase": phase, "updates": count, "bytes": sum(sizes), "slots": slots})
    return found


def _facts_out(clients: Sequence[Mapping[str, Any]]) -> list[Facts]:
    """Every fact beside the vectors that the server got or worked out for a silent site, and why it may leave."""

    def listed(allowed: Mapping[str, Fact], given: Sequence[Mapping[str, Any]], prefix: str = "") -> list[Facts]:
        present = {key for facts in given for key in facts}
        return [{"name": prefix + name, "why": fact.why} for name, fact in allowed.items() if name in present]

    phases = [phase for facts in clients for phase in facts.get("phases", ())]
    return listed(FACTS, clients) + listed(PHASE_FACTS, phases, "phases: ")
