"""Configurations proposed by Optuna's tree-structured Parzen estimator (TPE; Bergstra et al., NeurIPS 2011).

What is proposed follows from the space, a public key and the values found so far, and from nothing else: no study is
kept, so that a sweep that was killed goes on with the same trials. Optuna (an extra) is imported inside.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedlora.errors import ConfigError
from fedlora.experiments.sweeps.search_space import Choice, Range, Space
from fedlora.experiments.sweeps.sweep import Settings

Told = tuple[float | None, ...]
"""Values of the configurations tried so far, in order; None: it failed."""

_LEAST_BY_CHANCE = 4  # configurations before the estimator has anything to go by; a whole batch at least


def require_optuna() -> None:
    """Raise ConfigError unless Optuna is installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "tune.how = optuna needs Optuna; install the extra: pip install 'fedlora[tune]', or use how = random"
        )


@dataclass(frozen=True, kw_only=True)
class TreeParzen:
    """Batches of configurations, each from the values of all before it. Larger values are better."""

    space: Space
    key: str
    batch: int
    _batches: dict[Told, list[Settings]] = field(default_factory=dict, repr=False, compare=False)

    def proposed(self, count: int, value: Callable[[Settings], tuple[bool, float | None]]) -> list[Settings]:
        """Configurations to try now, those tried before included, at most `count`.

        Args:
            value: whether a configuration has ended, and its value.
        """
        found: list[Settings] = []
        told: Told = ()
        while len(found) < count:
            batch = self._batch(told)[: count - len(found)]
            found += batch
            answers = [value(configuration) for configuration in batch]
            if not all(ended for ended, _ in answers):
                break
            told += tuple(answer for _, answer in answers)
        return found

    def _batch(self, told: Told) -> list[Settings]:
        if told not in self._batches:
            self._batches[told] = self._asked(told)
        return self._batches[told]

    def _asked(self, told: Told) -> list[Settings]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(
            seed=random.Random(f"{self.key} {len(told)}").getrandbits(32),
            n_startup_trials=max(_LEAST_BY_CHANCE, self.batch),
            constant_liar=True,  # those of one batch keep away from one another
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        distributions = {dimension.name: _distribution(dimension) for dimension in self.space.dimensions}
        for start in range(0, len(told), self.batch):
            known = told[start : start + self.batch]
            for configuration, value in zip(self._batch(told[:start]), known, strict=True):
                study.add_trial(
                    optuna.trial.create_trial(
                        params=self._parameters(configuration),
                        distributions=distributions,
                        value=value,
                        state=optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE,
                    )
                )
        return [self._settings(study.ask(distributions).params) for _ in range(self.batch)]

    def _parameters(self, configuration: Settings) -> dict[str, Any]:
        """As Optuna has them: of a list, which of its values."""
        return {
            dimension.name: dimension.values.index(configuration[dimension.name])
            if isinstance(dimension, Choice)
            else configuration[dimension.name]
            for dimension in self.space.dimensions
        }

    def _settings(self, parameters: dict[str, Any]) -> Settings:
        return {
            dimension.name: dimension.values[parameters[dimension.name]]
            if isinstance(dimension, Choice)
            else dimension.rounded(parameters[dimension.name])
            for dimension in self.space.dimensions
        }


def _distribution(dimension: Choice | Range) -> Any:
    from optuna import distributions

    if isinstance(dimension, Choice):
        return distributions.CategoricalDistribution(range(len(dimension.values)))
    if dimension.whole:
        return distributions.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)
