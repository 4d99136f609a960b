"""SWEEP.toml: a grid over any keys of a run's configuration, and the cells that it stands for.

    recipe = "../recipes/sst2.toml"        # from this file's folder; none is the quickstart
    [set]                                  # of every cell
    run.evaluate_every = 5
    [grid]                                 # every combination of these values
    privacy.epsilon = [inf, 6.0, 3.0, 1.0]
    run.seed = [0, 1, 2]
    [axes.method]                          # values that belong together, under a label
    "FFA-LoRA" = {}
    "random half" = { adapter.select = "random" }
    [[exclude]]                            # cells for which all of this holds; lists: any of these
    method = "random half"
    privacy.epsilon = [1.0]
    [report]                               # what its tables compare
    compare = "method"
    baseline = "FFA-LoRA"

Axes vary slowest, in the order in which they are written, then the keys of the grid. Knows no torch and starts fast.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from fedlora.config import SECTIONS, RunConfig, parse_override
from fedlora.errors import ConfigError
from fedlora.schema import Section, build_section, parse_settings, read_settings, require_known, setting, shown

MOST_CELLS = 100_000
_LONGEST_LABEL = 80
_TABLES = ("recipe", "set", "grid", "axes", "exclude", "tune", "report")
_PRIVATE_KEYS = ("run.out", "run.transport")  # a cell's folder is the sweep's, and it runs in a worker

Settings = Mapping[str, Any]
"""Values by "section.key"."""


@dataclass(frozen=True, kw_only=True)
class ReportSection(Section, section="report"):
    compare: str = setting("", "axis whose labels the tables compare; empty: the first that is no task, ε or seed")
    baseline: str = setting("", "label of that axis that the others are compared with; empty: the first")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One dimension of the grid: settings by label, in order."""

    name: str
    values: Mapping[str, Settings]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep: a point of its grid, or a trial for the settings of some of them.

    Two cells with one digest would be one run.
    """

    axes: Mapping[str, str]
    """Label by axis, in the sweep's order."""
    config: RunConfig
    role: Literal["cell", "trial"] = "cell"

    @property
    def digest(self) -> str:
        return self.config.digest()

    @property
    def folder(self) -> str:
        """Of its run, from the sweep's folder."""
        return f"{self.role}s/{self.digest[:16]}"

    @property
    def name(self) -> str:
        return ", ".join(f"{axis.rpartition('.')[2]} {label}" for axis, label in self.axes.items()) or "the only cell"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep as it was asked for."""

    base: Settings
    """Of every cell: the recipe's, and over them those of [set]."""
    axes: tuple[Axis, ...]
    exclude: tuple[Mapping[str, Any], ...] = ()
    tune: Mapping[str, Any] = field(default_factory=dict)
    """[tune] as written; see `tuning`."""
    report: ReportSection = field(default_factory=ReportSection)

    @classmethod
    def from_toml(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a sweep and apply `section.key=value` overrides to all of its cells.

        Raises:
            ConfigError: a table, key or value is unknown or wrong, an override is about an axis, or there is no cell.
        """
        tables = parse_settings(read_settings(path, "sweep"), f"sweep {path}")
        for name in tables:
            require_known(name, _TABLES, "table", f"[{name}] in sweep {path}")
        base = _recipe(path, tables.get("recipe", "")) | flattened(_table(tables, "set"), "set")
        axes = (*_linked_axes(_table(tables, "axes")), *_grid_axes(_table(tables, "grid")))
        sweep = cls(
            base=base,
            axes=axes,
            exclude=tuple(_exclusions(tables.get("exclude", []))),
            tune=_table(tables, "tune"),
            report=build_section(ReportSection, _table(tables, "report")),
        )._with_overrides(overrides)
        sweep._check()
        return sweep

    def cells(self, chosen: Mapping[tuple[str, ...], Settings] | None = None) -> list[Cell]:
        """The cells of the grid, in order.

        Args:
            chosen: settings that tuning has found, by the labels of `points`; others are left out. None: all cells, as
                they are without tuning.

        Raises:
            ConfigError: settings of a cell do not go together, or two cells are the same run.
        """
        found: dict[str, Cell] = {}
        for labels, settings in self.points():
            point = tuple(labels.values())
            if chosen is not None and point not in chosen:
                continue
            cell = self.cell(labels, {**settings, **(chosen[point] if chosen else {})})
            if (twin := found.get(cell.digest)) is not None:
                raise ConfigError(
                    f"two cells of the sweep are the same run: {twin.name} and {cell.name}; "
                    "let their settings differ, or take one label out"
                )
            found[cell.digest] = cell
        return list(found.values())

    def points(self) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
        """Labels by axis, and the settings they stand for, of every cell that is not excluded."""
        for labels, settings in self._combinations():
            if not any(_holds(condition, labels, settings) for condition in self.exclude):
                yield labels, settings

    def _combinations(self) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
        for combination in itertools.product(*(axis.values.items() for axis in self.axes)):
            labels = {axis.name: label for axis, (label, _) in zip(self.axes, combination, strict=True)}
            settings = dict(self.base)
            for _, linked in combination:
                settings |= linked
            yield labels, settings

    def cell(self, labels: Mapping[str, str], settings: Settings, role: Literal["cell", "trial"] = "cell") -> Cell:
        """The run of these settings.

        Raises:
            ConfigError: naming the cell.
        """
        tables: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            section, _, key = name.partition(".")
            tables.setdefault(section, {})[key] = value
        cell = Cell(axes=labels, config=RunConfig(), role=role)
        try:
            return dataclasses.replace(cell, config=RunConfig.from_mapping(tables))
        except ConfigError as error:
            raise ConfigError(f"{role} of the sweep ({cell.name}): {error}") from error

    @property
    def compared(self) -> tuple[Axis, str] | None:
        """The axis whose labels the tables compare, and the label that the others are compared with."""
        ordinary = [axis for axis in self.axes if axis.name not in ("task", "data.task", "privacy.epsilon", "run.seed")]
        chosen = next((axis for axis in self.axes if axis.name == self.report.compare), next(iter(ordinary), None))
        return None if chosen is None else (chosen, self.report.baseline or next(iter(chosen.values)))

    def to_mapping(self) -> dict[str, Any]:
        """The sweep in one table without a recipe, as its folder keeps it; `from_toml` reads it."""
        grid = {axis.name: [values[axis.name] for values in axis.values.values()] for axis in self.axes if _plain(axis)}
        linked = {
            axis.name: {label: _nested(settings) for label, settings in axis.values.items()}
            for axis in self.axes
            if not _plain(axis)
        }
        tables = {
            "set": _nested(self.base),
            "axes": linked,
            "grid": _nested(grid),
            "exclude": [dict(condition) for condition in self.exclude],
            "tune": dict(self.tune),
            "report": dataclasses.asdict(self.report),
        }
        return {name: table for name, table in tables.items() if table}

    def _with_overrides(self, overrides: Sequence[str]) -> Self:
        base = dict(self.base)
        for override in overrides:
            section, key, value = parse_override(override)
            name = _known(f"{section}.{key}", "--set")
            taken = next((a.name for a in self.axes if any(name in linked for linked in a.values.values())), None)
            if taken:
                raise ConfigError(f"--set {override}: the sweep's axis {taken} decides {name}; change it in the sweep")
            if name in flattened(_table(self.tune, "space"), "tune.space"):
                raise ConfigError(f"--set {override}: [tune] of the sweep chooses {name}; take it out of [tune.space]")
            base[name] = value
        return dataclasses.replace(self, base=base)

    def _check(self) -> None:
        count = math.prod(len(axis.values) for axis in self.axes)
        if count > MOST_CELLS:
            raise ConfigError(f"the sweep has {count} cells, at most {MOST_CELLS} are sensible; make its grid smaller")
        decided: dict[str, str] = {}
        for axis in self.axes:
            for name in {name for linked in axis.values.values() for name in linked}:
                if name in decided:
                    raise ConfigError(f"axes {decided[name]} and {axis.name} of the sweep both decide {name}; use one")
                decided[name] = axis.name
        names = [axis.name for axis in self.axes]
        if self.report.compare:
            require_known(self.report.compare, names, "axis", f"report.compare = {shown(self.report.compare)}")
        if self.report.baseline and self.compared:
            axis = self.compared[0]
            require_known(
                self.report.baseline, axis.values, "label", f"report.baseline = {shown(self.report.baseline)}"
            )
        for name in names:
            if any(name == other.rpartition(".")[2] for other in names if other != name):
                raise ConfigError(f"axes.{name}: an axis of the grid is called so as well; give it another name")
        for condition in self.exclude:
            for name in condition:
                known = [*names, *(f"{section}.{key}" for section, key in _keys())]
                if "." not in name and not difflib.get_close_matches(name, names, cutoff=0.5):
                    known = names or ["none"]  # not every key of a run
                require_known(name, known, "axis or key", f"{name} in [[exclude]]")
            if not any(_holds(condition, labels, settings) for labels, settings in self._combinations()):
                raise ConfigError(
                    f"[[exclude]] with {shown(dict(condition))} is about no cell; correct it or take it out"
                )
        if next(self.points(), None) is None:
            raise ConfigError("the sweep has no cell: [[exclude]] takes them all; exclude less")


def label_of(value: Any) -> str:
    """A value of the grid as tables and folders show it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _recipe(path: Path, recipe: Any) -> dict[str, Any]:
    if not isinstance(recipe, str):
        raise ConfigError(f"recipe = {shown(recipe)} in sweep {path}, wanted the path of a recipe")
    if not recipe:
        return {}
    place = path.parent / recipe
    tables = parse_settings(read_settings(place, "recipe"), f"recipe {place}")
    run = tables.get("run")
    if isinstance(run, Mapping):  # the config.toml of a run serves as a recipe too
        tables["run"] = {key: value for key, value in run.items() if f"run.{key}" not in _PRIVATE_KEYS}
    return flattened(tables, f"recipe {place}")


def _table(tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{name} is {shown(table)}, wanted a table; write [{name}] above its keys")
    return dict(table)


def flattened(tables: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Values by "section.key"; each section and key is one of a run's."""
    flat = {}
    for section, table in tables.items():
        if "." in section and not isinstance(table, Mapping):  # "privacy.epsilon" in quotes is as good
            flat[_known(section, place)] = table
            continue
        require_known(section, SECTIONS, "section", f"{section} in {place}")
        if not isinstance(table, Mapping):
            raise ConfigError(f"{section} = {shown(table)} in {place}, wanted {section}.KEY = VALUE")
        flat |= {_known(f"{section}.{key}", place): value for key, value in table.items()}
    return flat


def _known(name: str, place: str) -> str:
    section, _, key = name.partition(".")
    require_known(section, SECTIONS, "section", f"{name} in {place}")
    fields = [spec.name for spec in dataclasses.fields(SECTIONS[section])]  # type: ignore[arg-type]
    require_known(key, fields, "key", f"{name} in {place}", prefix=f"{section}.")
    if name in _PRIVATE_KEYS:
        raise ConfigError(f"{name} in {place}: a sweep decides that for its cells; leave it out")
    return name


def _keys() -> Iterator[tuple[str, str]]:
    for section, kind in SECTIONS.items():
        yield from ((section, spec.name) for spec in dataclasses.fields(kind))  # type: ignore[arg-type]


def _linked_axes(tables: Mapping[str, Any]) -> Iterator[Axis]:
    for name, labels in tables.items():
        if not isinstance(labels, Mapping) or not labels:
            raise ConfigError(f"axes.{name} is {shown(labels)}, wanted labels with their settings")
        _check_label("name", name)
        if "." in name:
            raise ConfigError(f"axes.{name}: the name of an axis has no dot; a single key belongs into [grid]")
        for label, settings in labels.items():
            _check_label(name, label)
            if not isinstance(settings, Mapping):
                raise ConfigError(
                    f"axes.{name}.{label} = {shown(settings)}, wanted settings such as {{ data.task = ... }}"
                )
        yield Axis(
            name=name,
            values={label: flattened(settings, f"axes.{name}.{label}") for label, settings in labels.items()},
        )


def _check_label(axis: str, label: str) -> None:
    """Labels are shown in terminals, tables and figures as they are."""
    if not (0 < len(label) <= _LONGEST_LABEL and label.isprintable() and label == label.strip()):
        raise ConfigError(
            f"axes.{axis}: label {shown(label[:100])}, wanted 1 to {_LONGEST_LABEL} printable characters without "
            "blanks at its ends"
        )


def _grid_axes(table: Mapping[str, Any]) -> Iterator[Axis]:
    for name, values in flattened(table, "grid").items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid.{name} = {shown(values)}, wanted a list of values with at least one")
        labels = [label_of(value) for value in values]
        if len(set(labels)) < len(labels):
            raise ConfigError(f"grid.{name} = {shown(values)} has a value twice; leave one out")
        yield Axis(name=name, values={label: {name: value} for label, value in zip(labels, values, strict=True)})


def _exclusions(conditions: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(conditions, list) or not all(isinstance(entry, Mapping) and entry for entry in conditions):
        raise ConfigError(f"exclude is {shown(conditions)}, wanted tables; write [[exclude]] above each")
    for condition in conditions:
        nested = {name: value for name, value in condition.items() if name in SECTIONS and isinstance(value, Mapping)}
        yield {name: value for name, value in condition.items() if name not in nested} | flattened(nested, "exclude")


def _holds(condition: Mapping[str, Any], labels: Mapping[str, str], settings: Settings) -> bool:
    """Whether a cell is what `condition` describes: by label of an axis, or by value of a key, its default included."""
    for name, wanted in condition.items():
        found = settings.get(name, _default(name)) if "." in name else labels[name]
        if found not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def _default(name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(SECTIONS[section](), key)


def _plain(axis: Axis) -> bool:
    return "." in axis.name


def _nested(flat: Settings) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        section, _, key = name.partition(".")
        tables.setdefault(section, {})[key] = value
    return tables
