"""What [tune.space] leaves open: values by key, and the configurations that a grid or chance takes from it."""

from __future__ import annotations

import itertools
import math
import random
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from fedlora.config import SECTIONS
from fedlora.errors import ConfigError
from fedlora.experiments.sweeps.sweep import Settings, label_of
from fedlora.schema import require_known, shown

_DIGITS = 4  # of a number from a range: more would only be harder to read


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several values, in no order."""

    name: str
    values: tuple[Any, ...]

    @classmethod
    def of(cls, name: str, values: list[Any]) -> Self:
        if not values:
            raise ConfigError(f"tune.space.{name} = [] has no value; give some, or leave it out")
        if len({label_of(value) for value in values}) < len(values):
            raise ConfigError(f"tune.space.{name} = {shown(values)} has a value twice; leave one out")
        return cls(name=name, values=tuple(values))

    @property
    def size(self) -> float:
        return len(self.values)

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that fit the key if and only if all do."""
        return self.values

    def at(self, share: float) -> Any:
        """The value at `share` of the way, 0 <= share < 1."""
        return self.values[int(share * len(self.values))]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Any number from `low` to `high`, both included; whole ones where the key asks for these."""

    name: str
    low: float
    high: float
    log: bool
    whole: bool

    @classmethod
    def of(cls, name: str, table: Mapping[str, Any]) -> Self:
        """From { low = …, high = …, log = … }.

        Raises:
            ConfigError: it is no range of numbers, or the key takes none.
        """
        place = f"tune.space.{name}"
        for key in table:
            require_known(key, ("low", "high", "log"), "key", f"{place}.{key}")
        whole = _number_type(name) is int
        low, high = (_bound(table.get(end), whole=whole) for end in ("low", "high"))
        if not low < high:  # nan is not
            kind = "whole numbers" if whole else "numbers"
            raise ConfigError(f"{place} = {shown(table)}, wanted low and high, two {kind} with low below high")
        log = table.get("log", False)
        if not isinstance(log, bool) or (log and low <= 0):
            raise ConfigError(f"{place} = {shown(table)}, wanted log = true or false, and low above 0 where it is true")
        return cls(name=name, low=low, high=high, log=log, whole=whole)

    @property
    def size(self) -> float:
        return self.high - self.low + 1 if self.whole else math.inf

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.low, self.high

    def at(self, share: float) -> Any:
        """The value at `share` of the way, 0 <= share < 1; with `log`, of the way between logarithms."""
        margin = 0.5 if self.whole else 0.0  # each whole number has as much of the way as any other
        low, high = self.low - margin, self.high + margin
        return self.rounded(low * (high / low) ** share if self.log else low + share * (high - low))

    def rounded(self, value: float) -> Any:
        """`value` as it is tried: short enough to be read, and inside."""
        nearest = round(value) if self.whole else float(f"{value:.{_DIGITS}g}")
        kind = int if self.whole else float
        return kind(min(max(nearest, self.low), self.high))


@dataclass(frozen=True, kw_only=True)
class Space:
    """Everything that is left open, by name of its keys: in which order they are written decides no draw and no tie."""

    dimensions: tuple[Choice | Range, ...]

    @classmethod
    def of(cls, table: Settings) -> Self:
        """From the values of [tune.space] by "section.key".

        Raises:
            ConfigError: nothing is left open, or an entry is neither a list of values nor a range.
        """
        if not table:
            raise ConfigError(
                "[tune.space] is empty, so there is nothing to choose; give values such as "
                "training.learning_rate = [2.0, 8.0], or leave [tune] out"
            )
        return cls(dimensions=tuple(_dimension(name, table[name]) for name in sorted(table)))

    @property
    def size(self) -> float:
        """Number of configurations; infinite with a range of any numbers."""
        return math.prod(dimension.size for dimension in self.dimensions)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dimension.name for dimension in self.dimensions)

    @property
    def first(self) -> Settings:
        return next(self.corners())

    def corners(self) -> Iterator[Settings]:
        """Every combination of the values of lists and the ends of ranges."""
        for values in itertools.product(*(dimension.ends for dimension in self.dimensions)):
            yield {dimension.name: value for dimension, value in zip(self.dimensions, values, strict=True)}

    def grid(self) -> list[Settings]:
        """Every combination.

        Raises:
            ConfigError: a key has a range.
        """
        for dimension in self.dimensions:
            if isinstance(dimension, Range):
                raise ConfigError(
                    f"tune.space.{dimension.name} is a range, but tune.how = grid tries every value; list them, "
                    "or use how = random or optuna"
                )
        return list(self.corners())

    def drawn(self, key: str, count: int) -> list[Settings]:
        """`count` different configurations by chance, of which smaller counts take the first.

        Python promises that `random()` under one seed is the same in every version.

        Args:
            key: public; decides the draw.
            count: at most `size`.
        """
        chance = random.Random(key)  # for a public choice, no secret
        found: dict[str, Settings] = {}
        while len(found) < count:
            values = {dimension.name: dimension.at(chance.random()) for dimension in self.dimensions}
            found.setdefault(shown(values), values)
        return list(found.values())


def _dimension(name: str, entry: Any) -> Choice | Range:
    if isinstance(entry, list):
        return Choice.of(name, entry)
    if isinstance(entry, Mapping):
        return Range.of(name, entry)
    raise ConfigError(
        f"tune.space.{name} = {shown(entry)}, wanted a list of values, or {{ low = …, high = … }} for random and optuna"
    )


def _bound(value: Any, *, whole: bool) -> float:
    """An end of a range; nan where it is none."""
    fits = type(value) is int or (type(value) is float and not whole and math.isfinite(value))
    return value if fits else math.nan


def _number_type(name: str) -> type:
    section, _, key = name.partition(".")
    found = typing.get_type_hints(SECTIONS[section])[key]
    if found in (int, float):
        return typing.cast(type, found)
    raise ConfigError(f"tune.space.{name} has a range, but the key is no number; list its values")
