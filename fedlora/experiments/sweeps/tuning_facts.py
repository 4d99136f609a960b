"""record.json's key "tuning": how a cell's settings were chosen, on what, and at which price."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.config import SECTIONS, RunConfig
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.experiments.sweeps.sweep import Settings
from fedlora.experiments.sweeps.trial_charges import OUTSIDE_THE_PLAN, Unrecorded
from fedlora.experiments.sweeps.trial_cost import TrialCost, cost_with_trials
from fedlora.experiments.sweeps.tune_table import TuneTable
from fedlora.privacy.units import rounded_up

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Search:
    """The trials that one choice rests on."""

    table: TuneTable
    written: Any
    """[tune.space] as the author wrote it."""
    labels: Mapping[str, str]
    """What the choice is for, by axis of `per`."""
    settings: Settings
    """Of the trials, but for what was tried."""
    values: Settings
    """What was chosen."""
    runs: Sequence[StoredRun]
    """All that were made, also those that would not be proposed now."""
    planned: Mapping[str, RunConfig]
    """Those that are proposed now, by digest: a configuration that was proposed twice is here once."""
    place: Path
    """The folder that the runs' own are relative to."""

    def facts(self, record: Record) -> dict[str, Any]:
        """The key "tuning" for a run with this record; all of it can be JSON."""
        cost, free = self._cost(record), self._free(record)
        facts = {
            "how": self.table.how,
            "space": self.written,
            "per": dict(self.labels),
            "values": dict(self.values),
            "configurations": len({json.dumps(_configuration(run)) for run in self.runs}),
            "runs": len(self.runs),
            "runs_charged": 0 if free else len(self.runs) + len([*self._not_made()]),
            "costs_nothing": free,
            "failed": sum(run.status == "failed" for run in self.runs),
            "seeds": list(self.table.seeds),
            "chosen_on": f"the tuning half of the public validation records of {self._setting('data.task')}",
            "reported_on": f"the other half of those of {record['config']['data']['task']}",
            "trained_on": self._trained_on(record),
            "epsilon_with_trials": "inf" if cost.epsilon == math.inf else cost.epsilon,
            "delta": cost.delta,
            "accountant": cost.accountant,
            "reason": cost.reason,
        }
        return facts | {"note": _note(facts)}

    def _cost(self, record: Record) -> TrialCost:
        if self._free(record):
            return cost_with_trials(record, [])
        done = [run.record for run in self.runs if run.record is not None]
        cost = cost_with_trials(record, done, [*self._failed(), *self._not_made()])
        moved = ", ".join(name for name in self.table.space.names if name not in OUTSIDE_THE_PLAN)
        if not moved or cost.epsilon == math.inf:
            return cost
        reason = f"{moved} was chosen too, on which sampling and noise depend; choose it on public records"
        return replace(cost, epsilon=None, reason=reason)

    def _failed(self) -> Iterator[Unrecorded]:
        for run in self.runs:
            if run.record is None:
                yield Unrecorded(config=self.planned.get(run.digest), folder=RunFolder(self.place / run.folder))

    def _not_made(self) -> Iterator[Unrecorded]:
        """One for each run that was planned and is another's twin.

        How many there are can follow from what was released, so that leaving them out would tell.
        """
        for seed in self.table.seeds:
            alike = [config for config in self.planned.values() if config.run.seed == seed]
            yield from [Unrecorded(config=alike[0])] * (self.table.configurations - len(alike))

    def _free(self, record: Record) -> str:
        """Why the trials cost the run's sites nothing; empty where they do."""
        if self.table.records == "public":
            return "on the word of the sweep's author"
        return "since they trained on a generated corpus" if self._made_up(record) else ""

    def _made_up(self, record: Record) -> bool:
        """Whether trials train on a generated corpus and the run does not; in a run it stands for private records."""
        return self._setting("data.source") == "generated" and str(record["config"]["data"]["source"]) != "generated"

    def _trained_on(self, record: Record) -> str:
        if self._made_up(record):
            return "a generated corpus, public by itself"
        places = {"generated": "records of a generated corpus", "hub": "the hub's records"}
        place = places.get(self._setting("data.source"), "records of a folder")
        if self.table.records == "public":
            return f"{place}, public by the word of the sweep's author"
        return f"{place}, which count as private"

    def _setting(self, name: str) -> str:
        """Of the trials, its default included."""
        section, _, key = name.partition(".")
        return str(self.settings.get(name, getattr(SECTIONS[section](), key)))


def _configuration(run: StoredRun) -> dict[str, str]:
    return {name: label for name, label in sorted(run.axes.items()) if name != "run.seed"}


def _note(facts: Mapping[str, Any]) -> str:
    """All of it in two sentences, for a report."""
    tried = f"{_counted(facts['configurations'], 'configuration')} in {_counted(facts['runs'], 'trial run')}"
    failed = f", {facts['failed']} of which failed" if facts["failed"] else ""
    return (
        f"Settings chosen among {tried}{failed}, trained on {facts['trained_on']}, scored on {facts['chosen_on']}; "
        f"reported on {facts['reported_on']}. {_price(facts)}."
    )


def _price(facts: Mapping[str, Any]) -> str:
    bound, charged = facts["epsilon_with_trials"], facts["runs_charged"]
    if facts["costs_nothing"]:
        return f"The trials cost these sites nothing, {facts['costs_nothing']}"
    if bound is None:
        return f"What trials and this run together cost a record is not known: {facts['reason']}"
    if bound == "inf":
        return f"Together with its trials this run promises nothing: {facts['reason']}"
    counted = "All of them" if charged == facts["runs"] else f"The {charged} trial runs that were planned"
    return (
        f"{counted} with this run cost a record of a site at most ε = {rounded_up(bound):g} at "
        f"δ = {facts['delta']:g} against the server and every other site"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
