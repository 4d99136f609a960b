"""What one run of a sweep was charged at each site: as its record tells or, where it has none, its ledger and its plan.

A run that failed may have released anything up to what was planned, and more if it was resumed: rounds that died with
a process were done anew. How far it got can depend on what was released, and a sum is a bound only for what was fixed
beforehand. So it counts as everything that was planned, with the rounds done anew that its ledger tells of on top.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from fedlora.config import RunConfig
from fedlora.errors import FedloraError
from fedlora.experiments.run_folder import RunFolder, to_json
from fedlora.privacy.accounting import Charge
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.ledger_file import ABANDONED, RESERVED, Entry

Record = Mapping[str, Any]
Phases = Mapping[str, Charge]
"""What one run cost a record at one site, by phase."""
Run = Mapping[int, Phases]
"""The same of all sites."""

OUTSIDE_THE_PLAN = (
    *("training.learning_rate", "training.optimizer", "training.schedule", "training.momentum"),
    *("training.weight_decay", "training.noise_filter", "training.filter_gain", "training.keep_state"),
    *("privacy.clip_norm", "privacy.clipping", "privacy.low_pass", "adapter.rank", "adapter.alpha"),
    *("adapter.target_modules", "adapter.ratio", "adapter.discretise", "adapter.sharing", "adapter.warm_start"),
    *("adapter.gate_learning_rate", "model.temperature"),
    *("model.dtype", "model.attention", "data.validation_part", "data.max_length"),
    *("run.device", "run.transport", "run.workers", "run.evaluate_every", "run.out"),
    *("engine.backend", "engine.token_budget", "engine.noise"),
    *("engine.matmul_precision", "engine.compile", "engine.prefix_cache"),
)
"""Settings that change no site's q, σ or steps."""


class UnknownCharge(Exception):
    """Nothing tells what was spent; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Unrecorded:
    """A trial that was planned and has no record."""

    config: RunConfig | None
    """As asked; None where that is not known."""
    folder: RunFolder | None = None
    """Of its run, which failed; None where it was never made: a configuration that is proposed twice is run once."""

    @property
    def promised(self) -> bool:
        return self.config is None or (self.config.private and not self.config.privacy.seeded_noise)

    def charges(self, trials: Sequence[Record]) -> tuple[str, Run]:
        """How it dealt records to sites, and no less than it was charged at each.

        Args:
            trials: records of others; of those with the same plan, some under the same seed tell what was planned at
                each site. Under another seed sites have other sizes: then it counts as the dearest of all.

        Raises:
            UnknownCharge: there is none, or the ledger does not tell what was done anew.
        """
        if self.config is None:
            raise UnknownCharge("a trial failed, and nothing tells what it was to do")
        _check_unit(self.config.privacy.unit)
        deal = deal_of(self.config.to_mapping())
        planned = _planned(self.config, deal, trials)
        rounds = [] if self.folder is None else _ledger(self.folder)
        sites = planned.keys() | {row.site for row in rounds}
        return deal, {
            site: _together(planned.get(site, {}), [row for row in rounds if row.site == site]) for site in sites
        }


def deal_of(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """What decides which site has which record."""
    dealt = [settings["data"], settings["federation"]["clients"], settings["run"]["seed"]]
    return json.dumps(to_json(dealt), sort_keys=True)


def recorded(record: Record) -> Run:
    """By site and phase. A round that was done anew after a stop may have been one of any phase: each is charged.

    Raises:
        UnknownCharge: a site was never heard of, the record is of an old kind, or no record was protected.
    """
    _check_unit(record["config"]["privacy"].get("unit", "record"))
    try:
        again = {site["client"]: site["rounds_charged"] - site["rounds_asked"] for site in record["privacy"]["sites"]}
        most = record["config"]["federation"]["local_steps"]
        return {
            facts["client"]: {phase["name"]: _charge(phase, again[facts["client"]], most) for phase in facts["phases"]}
            for facts in record["clients"]
        }
    except KeyError as missing:
        raise UnknownCharge(f"a record does not tell {missing} of every site") from missing


def _check_unit(unit: str) -> None:
    """Raise UnknownCharge unless records are protected: charges of other units cannot be added to theirs."""
    if unit != "record":
        raise UnknownCharge(f"a run with privacy.unit = {unit} is among them, which promises single records nothing")


def dearest(sites: Iterable[Phases]) -> Phases:
    """Phase by phase no less than any of them was charged."""
    alike: dict[str, list[Charge]] = {}
    for phases in sites:
        for name, charge in phases.items():
            alike.setdefault(name, []).append(charge)
    return {
        name: Charge(
            max(charge.sampling_probability for charge in charges),
            min(charge.noise_multiplier for charge in charges),
            max(charge.num_steps for charge in charges),
        )
        for name, charges in sorted(alike.items())
    }


def _charge(phase: Mapping[str, Any], rounds_again: int, most: int) -> Charge:
    steps: int = phase["num_steps"]
    steps += rounds_again * min(steps, most)
    return Charge(phase["sampling_probability"], phase["effective_noise_multiplier"], steps)


def _planned(config: RunConfig, deal: str, trials: Sequence[Record]) -> Run:
    """What trials were to be charged, at each site where records are dealt alike, else as the dearest at every site.

    Raises:
        UnknownCharge: none of them had this plan.
    """
    plan = _plan_of(config.to_mapping())
    twins = [record for record in trials if _plan_of(record["config"]) == plan]
    if not twins:
        raise UnknownCharge("a trial failed, and no other run tells what it may have released before")
    runs = [(deal_of(record["config"]), recorded(_without_stops(record))) for record in twins]
    alike = [run for dealt, run in runs if dealt == deal]
    if alike:
        return {site: dearest(run.get(site, {}) for run in alike) for site in set().union(*alike)}
    worst = dearest(phases for _, run in runs for phases in run.values())
    return dict.fromkeys(range(config.federation.clients), worst)


def _plan_of(settings: Mapping[str, Mapping[str, Any]]) -> Any:
    """Settings that decide what a run costs, but for the seed, which decides what size sites have."""
    flat = {f"{section}.{key}": value for section, table in settings.items() for key, value in table.items()}
    return to_json({name: value for name, value in flat.items() if name not in (*OUTSIDE_THE_PLAN, "run.seed")})


def _without_stops(record: Record) -> Record:
    sites = [{**site, "rounds_charged": site["rounds_asked"]} for site in record.get("privacy", {}).get("sites", ())]
    return {**record, "privacy": {"sites": sites}}


# What a failed run's ledger tells ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Round:
    """One round that a site was charged for."""

    site: int
    phase: str
    charge: Charge
    anew: bool
    """It died with its process, and there may be another one in its place."""


def _ledger(folder: RunFolder) -> list[_Round]:
    """Everything in a run's ledger; nothing where the run stopped before it had one.

    Raises:
        UnknownCharge: it is lost or cannot be read.
    """
    file = folder.ledger_file
    if not file.exists() or not file.stat().st_size:
        later = (folder.asked_file, folder.checkpoint_file, folder.rounds_file, folder.record_file)
        if any(other.exists() for other in later):
            raise UnknownCharge("a trial failed, and its ledger is lost")
        return []
    try:
        with closing(Ledger.read(file)) as ledger:
            entries = ledger.entries()
    except FedloraError as error:
        raise UnknownCharge("a trial failed, and its ledger cannot be read") from error
    abandoned = {entry.reservation for entry in entries if entry.kind == ABANDONED}
    return [_round(entry, anew=entry.id in abandoned) for entry in entries if entry.kind == RESERVED]


def _round(entry: Entry, *, anew: bool) -> _Round:
    match = re.fullmatch(r"client (\d+)", entry.data_set or "")  # what a simulation calls a site's records
    numbers = (entry.sampling_probability, entry.noise_multiplier, entry.num_steps)
    if match is None or not entry.purpose or None in numbers:
        raise UnknownCharge("a trial failed, and its ledger does not tell what it charged to which site")
    return _Round(site=int(match[1]), phase=entry.purpose, charge=Charge(*numbers), anew=anew)  # type: ignore[arg-type]


def _together(planned: Phases, rounds: Sequence[_Round]) -> Phases:
    """Of each phase all that was planned, or that stands in the ledger where this is more, and what was done anew."""
    total = {}
    for phase in {*planned, *(row.phase for row in rounds)}:
        rows = [row for row in rounds if row.phase == phase]
        alike = [*(row.charge for row in rows), *([planned[phase]] if phase in planned else [])]
        stands = sum(row.charge.num_steps for row in rows if not row.anew)
        again = sum(row.charge.num_steps for row in rows if row.anew)
        worst = dearest({phase: charge} for charge in alike)[phase]
        steps = max(stands, planned[phase].num_steps if phase in planned else 0) + again
        total[phase] = replace(worst, num_steps=steps)
    return total
