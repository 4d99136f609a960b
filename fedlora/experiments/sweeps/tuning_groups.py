"""Which points of a sweep share one choice of settings, and what decides the trials for it.

Trials belong to a folder as cells do: a sweep that is changed must find those that were run, or they would be replaced
in silence, having been released. The order of labels matters only where an axis outside `per` gives trials a setting;
the order of the keys of [tune.space] nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedlora.experiments.sweeps.sweep import Cell, Settings, Sweep
from fedlora.experiments.sweeps.tune_table import TuneTable

Labels = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Points of the sweep that share one choice."""

    labels: Mapping[str, str]
    """By axis of `per`."""
    first: Mapping[str, str]
    """Of its first point, by axis; the settings of its trials are of there."""
    settings: Settings
    """Of its trials, but for what is tried."""
    points: tuple[Labels, ...]


def groups_of(sweep: Sweep, table: TuneTable) -> Iterator[Group]:
    """In the order of their first points, which give trials the settings of axes outside `per`."""
    found: dict[Labels, list[tuple[Mapping[str, str], Settings]]] = {}
    for point in sweep.points():
        found.setdefault(tuple(point[0][axis] for axis in table.per), []).append(point)
    for shared, points in found.items():
        first, settings = points[0]
        yield Group(
            labels=dict(zip(table.per, shared, strict=True)),
            first=first,
            settings={**settings, **table.settings, "data.validation_part": "tuning"},
            points=tuple(tuple(labels.values()) for labels, _ in points),
        )


def key_of(sweep: Sweep, table: TuneTable, group: Group) -> str:
    """What decides chance: the space and the group, so that cells can be added to a sweep and trials stay."""
    return json.dumps([table.how, sweep.tune["space"], dict(group.labels)], sort_keys=True)


def replaced_trials(earlier: Sweep, sweep: Sweep) -> str | None:
    """What keeps `sweep` from finding the trials of `earlier`, which has the same [tune]; None where it finds them."""
    tables = TuneTable.of(earlier), TuneTable.of(sweep)
    before = {tuple(group.labels.values()): group for group in groups_of(earlier, tables[0])}
    for group in groups_of(sweep, tables[1]):
        old = before.get(tuple(group.labels.values()))
        if old is not None and _one(earlier, tables[0], old).digest != _one(sweep, tables[1], group).digest:
            moved = [axis for axis in group.first if group.first[axis] != old.first[axis]]
            shown = ", ".join(f"{axis} {old.first[axis]}, not {group.first[axis]}" for axis in moved)
            return f"trials at {shown} (new labels go behind the one that trials run at, and [[exclude]] leaves it)"
    return None


def _one(sweep: Sweep, table: TuneTable, group: Group) -> Cell:
    """A trial of the group; whatever makes others differ from it is in [tune]."""
    settings = {**group.settings, **table.space.first, "run.seed": table.seeds[0]}
    return sweep.cell(group.labels, settings, role="trial")
