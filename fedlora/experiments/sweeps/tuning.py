"""[tune] of SWEEP.toml: settings that are chosen by trials, on records that nothing is reported on.

    [tune]
    per = ["task", "method"]     # one choice for each combination of these axes' labels
    how = "grid"                 # grid | random | optuna
    trials = 8                   # configurations of each choice, for random and optuna
    seeds = [1000]               # run.seed of trials; a configuration's value is the mean over them
    records = "private"          # or "public": the author's word for what the trials train on
    batch = 4                    # configurations that optuna proposes at once
    [tune.set]                   # of trials only
    privacy.epsilon = 3.0
    [tune.space]
    training.learning_rate = [2.0, 8.0]
    privacy.clip_norm = { low = 0.1, high = 2.0, log = true }

Trials are scored on one half of the public validation records (data.validation_part = "tuning"), the cells of the sweep
on the other ("reporting"). Everything follows from the sweep and the results so far, so that a sweep that was killed
goes on with the same trials. See docs/tuning.md, and `trial_cost` for what it costs.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.experiments.sweeps.sweep import Cell, Settings, Sweep, label_of
from fedlora.experiments.sweeps.tree_parzen import TreeParzen
from fedlora.experiments.sweeps.tune_table import TuneTable
from fedlora.experiments.sweeps.tuning_facts import Search
from fedlora.experiments.sweeps.tuning_groups import Group, Labels, groups_of, key_of

Results = Mapping[str, StoredRun]
"""Runs that are done or failed, by the digest of their cell."""

_REPORTED = {"data.validation_part": "reporting"}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One configuration, run with every seed of [tune]."""

    values: Settings
    runs: Mapping[str, Cell]
    """By digest."""

    def ended(self, results: Results) -> bool:
        return all(digest in results for digest in self.runs)

    def value(self, results: Results) -> float | None:
        """Mean of the metric over its runs, all of which have ended; None where one failed or has no number."""
        records = [results[digest].record for digest in self.runs]
        values = [math.nan if record is None else float(record["metric"]["value"]) for record in records]
        return statistics.fmean(values) if all(map(math.isfinite, values)) else None


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The choices of a sweep. Use `of`."""

    sweep: Sweep
    table: TuneTable
    groups: tuple[Group, ...]
    _trials: dict[str, Trial] = field(default_factory=dict, repr=False, compare=False)
    """Made before: a configuration takes milliseconds to check."""
    _parzen: dict[Labels, TreeParzen] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, sweep: Sweep) -> Self | None:
        """What [tune] of `sweep` asks for; None where nothing is tuned.

        Raises:
            ConfigError: [tune] is wrong, at odds with the sweep, or some of its trials could not run.
        """
        if not sweep.tune:
            return None
        table = TuneTable.of(sweep)
        tuning = cls(sweep=sweep, table=table, groups=tuple(groups_of(sweep, table)))
        table.check_count(len(tuning.groups))
        for group in tuning.groups:
            for configuration in table.samples(key_of(sweep, table, group)):
                tuning._trial(group, configuration)
        sweep.cells({point: {**table.space.first, **_REPORTED} for group in tuning.groups for point in group.points})
        return tuning

    def total(self) -> int:
        """Number of trial runs, where no configuration is proposed twice."""
        return len(self.groups) * self.table.configurations * len(self.table.seeds)

    def ready(self, results: Results) -> list[Cell]:
        """Trials that can be run by now, those that have ended included."""
        trials = (trial for group in self.groups for trial in self._proposed(group, results))
        return list({digest: cell for trial in trials for digest, cell in trial.runs.items()}.values())

    def chosen(self, results: Results) -> dict[Labels, dict[str, Any]]:
        """What the cells get, by the labels of `Sweep.points`, wherever all trials have ended and some went well."""
        best = ((group, self._best(group, results)) for group in self.groups)
        return {point: {**trial.values, **_REPORTED} for group, trial in best if trial for point in group.points}

    def failed(self, results: Results) -> dict[Labels, str]:
        """Why there is no choice for points whose trials have all ended, none of them well."""
        return {
            point: f"all {self.table.configurations} configurations tried for it failed; see the trials' errors"
            for group in self.groups
            if self._all_ended(group, results) and self._best(group, results) is None
            for point in group.points
        }

    def facts(self, cell: Cell, results: Results, record: Mapping[str, Any], place: Path) -> dict[str, Any]:
        """The key "tuning" of a cell's record: how its settings were chosen, on what, and at which price.

        Args:
            results: with those of all trials that the choice rests on.
            record: of the cell itself.
            place: the sweep's folder, where failed trials have ledgers.
        """
        group = next(group for group in self.groups if group.labels.items() <= cell.axes.items())
        planned = {digest: cell for trial in self._proposed(group, results) for digest, cell in trial.runs.items()}
        best = self._best(group, results)
        search = Search(
            table=self.table,
            written=self.sweep.tune["space"],
            labels=group.labels,
            settings=group.settings,
            values=best.values if best else {},
            runs=[run for digest, run in results.items() if digest in planned or _of_group(run, group)],
            planned={digest: cell.config for digest, cell in planned.items()},
            place=place,
        )
        return search.facts(record)

    def _proposed(self, group: Group, results: Results) -> list[Trial]:
        if self.table.how != "optuna":
            return [self._trial(group, configuration) for configuration in self.table.fixed(self._key(group))]

        def answer(configuration: Settings) -> tuple[bool, float | None]:
            trial = self._trial(group, configuration)
            ended = trial.ended(results)
            return ended, trial.value(results) if ended else None

        parzen = self._parzen.setdefault(
            tuple(group.labels.values()),
            TreeParzen(space=self.table.space, key=self._key(group), batch=self.table.batch),
        )
        found = parzen.proposed(self.table.configurations, answer)
        return [self._trial(group, configuration) for configuration in found]

    def _key(self, group: Group) -> str:
        return key_of(self.sweep, self.table, group)

    def _trial(self, group: Group, configuration: Settings) -> Trial:
        name = json.dumps([dict(group.labels), dict(configuration)])
        if name not in self._trials:
            tried = {key: label_of(value) for key, value in configuration.items()}
            cells = [
                self.sweep.cell(
                    {**group.labels, **tried, "run.seed": str(seed)},
                    {**group.settings, **configuration, "run.seed": seed},
                    role="trial",
                )
                for seed in self.table.seeds
            ]
            self._trials[name] = Trial(values=configuration, runs={cell.digest: cell for cell in cells})
        return self._trials[name]

    def _all_ended(self, group: Group, results: Results) -> bool:
        trials = self._proposed(group, results)
        return len(trials) == self.table.configurations and all(trial.ended(results) for trial in trials)

    def _best(self, group: Group, results: Results) -> Trial | None:
        """The first of those with the largest value; None until all have ended, or if all failed."""
        if not self._all_ended(group, results):
            return None
        values = [(trial, trial.value(results)) for trial in self._proposed(group, results)]
        valued = [(trial, value) for trial, value in values if value is not None]
        return max(valued, key=lambda pair: pair[1])[0] if valued else None


def _of_group(run: StoredRun, group: Group) -> bool:
    """Whether it was a trial for these points, also one that would not be proposed now, as with another Optuna."""
    return run.role == "trial" and group.labels.items() <= run.axes.items()
