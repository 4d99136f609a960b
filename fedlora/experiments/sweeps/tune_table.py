"""[tune] as it is written: read, and checked against the sweep that it is part of. `tuning` says what the keys mean."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from fedlora.errors import ConfigError
from fedlora.experiments.sweeps.search_space import Space
from fedlora.experiments.sweeps.sweep import Settings, Sweep, flattened
from fedlora.experiments.sweeps.tree_parzen import require_optuna
from fedlora.schema import Section, build_section, require_known, setting, shown

MOST_TRIALS = 10_000
_MOST_SAMPLES = 1_000
_NOT_CHOSEN = (
    *("data.task", "data.source", "data.train_share", "data.validation_part"),
    *("privacy.epsilon", "privacy.delta", "privacy.unit", "privacy.seeded_noise", "privacy.allow_unsound"),
    *("run.seed", "run.device"),
)
"""What is asked of a run, or what decides how its result is measured: the best of these would be no better."""
_DECIDED = ("run.seed", "data.validation_part")
"""Of trials, by tuning itself."""


@dataclass(frozen=True, kw_only=True)
class _PlainKeys(Section, section="tune"):
    how: Literal["grid", "random", "optuna"] = setting("grid", "every combination | by chance | Optuna's TPE")
    trials: int = setting(0, "configurations of each choice, for random and optuna", at_least=0)
    batch: int = setting(4, "configurations that optuna proposes at once", at_least=1)
    records: Literal["private", "public"] = setting("private", "public: the author's word for what trials train on")


_PLAIN = tuple(spec.name for spec in fields(_PlainKeys))
_KEYS = (*_PLAIN, "per", "seeds", "set", "space")


@dataclass(frozen=True, kw_only=True)
class TuneTable:
    """What [tune] asks for."""

    per: tuple[str, ...]
    """Axes, in the sweep's order."""
    how: Literal["grid", "random", "optuna"]
    configurations: int
    """Of each choice."""
    batch: int
    seeds: tuple[int, ...]
    records: Literal["private", "public"]
    settings: Settings
    """Of trials only."""
    space: Space

    @classmethod
    def of(cls, sweep: Sweep) -> Self:
        """[tune] of `sweep`.

        Raises:
            ConfigError: a key is unknown or wrong, or at odds with the rest of the sweep.
        """
        for key in sweep.tune:
            require_known(key, _KEYS, "key", f"tune.{key}", prefix="tune.")
        plain = build_section(_PlainKeys, {key: value for key, value in sweep.tune.items() if key in _PLAIN})
        space = Space.of(_settings(sweep, "space"))
        table = cls(
            per=_per(sweep),
            how=plain.how,
            configurations=_configurations(plain, space, sweep.tune),
            batch=plain.batch,
            seeds=_seeds(sweep.tune.get("seeds", [1000])),
            records=plain.records,
            settings=_settings(sweep, "set"),
            space=space,
        )
        table._check(sweep)
        return table

    def check_count(self, groups: int) -> None:
        """Raise ConfigError if so many choices take more trials than is sensible."""
        count = groups * self.configurations * len(self.seeds)
        if count > MOST_TRIALS:
            raise ConfigError(
                f"[tune] asks for {count} trials ({groups} choices, {self.configurations} configurations, "
                f"{len(self.seeds)} seeds), at most {MOST_TRIALS} are sensible; open less, or choose per fewer axes"
            )

    def fixed(self, key: str) -> list[Settings]:
        """All configurations of a grid or by chance."""
        return self.space.grid() if self.how == "grid" else self.space.drawn(key, self.configurations)

    def samples(self, key: str) -> list[Settings]:
        """What to build before anything runs, so that no mistake waits for the last trial."""
        corners = itertools.islice(self.space.corners(), _MOST_SAMPLES)
        return list(corners) if self.how == "optuna" else self.fixed(key)

    def _check(self, sweep: Sweep) -> None:
        if self.how == "optuna":
            require_optuna()
        by_axis = {name: axis.name for axis in sweep.axes for linked in axis.values.values() for name in linked}
        part = sweep.base.get("data.validation_part", "reporting")
        if part != "reporting" or "data.validation_part" in by_axis:
            raise ConfigError(
                "the sweep sets data.validation_part, but with [tune] trials are scored on one half of the validation "
                "records and cells on the other; leave it out"
            )
        for name in self.space.names:
            if name in _NOT_CHOSEN:
                raise ConfigError(
                    f"tune.space.{name}: this is asked of a run and is no setting to choose; give it in [grid] or [set]"
                )
            if name in by_axis or name in self.settings:
                place = f"the axis {by_axis[name]}" if name in by_axis else "[tune.set]"
                raise ConfigError(f"tune.space.{name}: {place} decides {name} already; take it out of one of them")
        for name in (*_DECIDED, *self.settings):
            if name in self.per:
                raise ConfigError(f"tune.per has {name}, but trials do not take it from there; leave it out")
        for name in _DECIDED:
            if name in self.settings:
                raise ConfigError(
                    f"tune.set.{name}: tuning decides that for its trials; leave it out (seeds: tune.seeds)"
                )
        self._check_epsilon(sweep, by_axis)
        if taken := sorted({_seed(settings) for _, settings in sweep.points()} & set(self.seeds)):
            raise ConfigError(
                f"tune.seeds = {shown(list(self.seeds))} and the sweep itself both have run.seed = {taken[0]}; "
                "choose on seeds that nothing is reported on"
            )

    def _check_epsilon(self, sweep: Sweep, by_axis: Mapping[str, str]) -> None:
        """The first of several ε is often ∞, and would be a choice without noise at no guarantee."""
        name = "privacy.epsilon"
        if name in by_axis and by_axis[name] not in self.per and name not in self.settings:
            raise ConfigError(
                f"[tune] chooses once for all values of {by_axis[name]}; say at which ε its trials run, such as "
                "privacy.epsilon = 3.0 in [tune.set], or add the axis to tune.per"
            )


def _settings(sweep: Sweep, name: str) -> dict[str, Any]:
    table = sweep.tune.get(name, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"tune.{name} is {shown(table)}, wanted a table; write [tune.{name}] above its keys")
    return flattened(table, f"tune.{name}")


def _per(sweep: Sweep) -> tuple[str, ...]:
    names = [axis.name for axis in sweep.axes]
    if "per" not in sweep.tune:
        return tuple(axis.name for axis in sweep.axes if not _repeats(axis.values.values()))
    per = sweep.tune["per"]
    if not isinstance(per, list) or not all(isinstance(name, str) for name in per) or len(set(per)) < len(per):
        raise ConfigError(f"tune.per = {shown(per)}, wanted a list of axes, each once; [] chooses once for all cells")
    for name in per:
        require_known(name, names, "axis", f"{name} in tune.per")
    return tuple(name for name in names if name in per)


def _repeats(values: Iterable[Settings]) -> bool:
    """Whether an axis is about ε or seeds and nothing else: the same question once more."""
    decided = {name for linked in values for name in linked}
    return bool(decided) and decided <= {"privacy.epsilon", "run.seed"}


def _configurations(plain: _PlainKeys, space: Space, table: Mapping[str, Any]) -> int:
    if plain.how == "grid":
        for key in ("trials", "batch"):
            if key in table:
                raise ConfigError(f"tune.{key} is given, but tune.how = grid tries every combination; leave it out")
        if MOST_TRIALS < space.size < math.inf:
            raise ConfigError(f"[tune.space] has {space.size:g} combinations, at most {MOST_TRIALS} are sensible")
        return len(space.grid())
    if plain.how == "random" and "batch" in table:
        raise ConfigError("tune.batch is given, but only tune.how = optuna proposes in batches; leave it out")
    if not plain.trials:
        raise ConfigError(f"tune.trials is missing: how many configurations tune.how = {plain.how} tries")
    if plain.trials > space.size:
        raise ConfigError(
            f"tune.trials = {plain.trials}, but [tune.space] has {space.size:g} configurations; use how = grid"
        )
    return plain.trials


def _seeds(seeds: Any) -> tuple[int, ...]:
    whole = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or len(set(seeds)) < len(seeds):
        raise ConfigError(f"tune.seeds = {shown(seeds)}, wanted a list of different whole numbers >= 0")
    return tuple(seeds)


def _seed(settings: Settings) -> Any:
    return settings.get("run.seed", 0)
