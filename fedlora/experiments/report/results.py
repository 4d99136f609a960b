"""What a report is about: the runs of a store, each on its place in the comparison, and all that is missing.

Records are read as they come: an old one may lack keys, and what needs them is then left out and said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedlora.errors import StoreError
from fedlora.experiments.record import guarantee_of
from fedlora.experiments.runs.store import FILE_NAME, Store
from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.experiments.sweeps.sweep import Sweep
from fedlora.experiments.terminal import one_line
from fedlora.privacy.units import Guarantee

TASK_AXES, EPSILON_AXIS, SEED_AXIS = ("task", "data.task"), "privacy.epsilon", "run.seed"
SWEEP_FILE = "sweep.toml"
Kind = Literal["failed", "unfinished", "unreadable"]
KINDS: tuple[Kind, ...] = ("failed", "unfinished", "unreadable")


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A run that is done, and where it stands. What its record does not say is None.

    Attributes:
        task: its task and, where the sweep has other axes, their labels.
        label: on the axis that is compared.
        epsilon: that was asked for; infinite without privacy.
        spent: ε of the worst site, with rounds that were charged twice; infinite without privacy.
        sigma: smallest effective noise multiplier of training over sites.
        bytes_up: sent by all sites together.
        curve: (round, metric) wherever it was evaluated.
        unused: answers of clients that were asked for and not used, or never came.
        record: whole.
    """

    folder: str
    role: str
    digest: str
    task: str
    label: str
    epsilon: float
    seed: str
    metric: str
    value: float
    spent: float | None
    guarantee: Guarantee | None
    sigma: float | None
    bytes_up: int | None
    seconds: float | None
    curve: tuple[tuple[int, float], ...]
    unused: int
    record: Mapping[str, Any]

    @property
    def validation_part(self) -> str:
        return str(found(self.record, "config", "data", "validation_part") or "all")

    @property
    def promised(self) -> bool:
        """Whether ε bounds anything."""
        return self.guarantee is not None and not self.guarantee.flaws

    @property
    def code(self) -> str:
        return str(self.record.get("code_digest") or "unknown")


@dataclass(frozen=True, kw_only=True)
class Left:
    """A run that is in no table, and why."""

    kind: Kind
    folder: str
    role: str
    name: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """Runs by task, label and ε.

    Attributes:
        axis: what is compared, in words.
        epsilons: ascending, infinity last.
        left: runs that failed, have not ended, or whose record lacks what a table needs.
        num_trials: runs that looked for settings; in no table.
    """

    runs: tuple[ReportedRun, ...]
    axis: str
    tasks: tuple[str, ...]
    labels: tuple[str, ...]
    baseline: str
    epsilons: tuple[float, ...]
    left: tuple[Left, ...]
    num_trials: int

    def of(self, task: str, label: str | None = None, epsilon: float | None = None) -> list[ReportedRun]:
        """Runs of a task, of a label and ε where given; by seed."""
        return [
            run
            for run in self.runs
            if run.task == task and label in (None, run.label) and epsilon in (None, run.epsilon)
        ]


def read_results(place: Path) -> Results:
    """The runs of a store, in the order of its sweep where that is there.

    Args:
        place: folder of a sweep or of runs, or the store itself.

    Raises:
        StoreError: there is no store, it cannot be read, or no run in it can be shown.
        ConfigError: the sweep beside it is no sweep.
    """
    with Store.open(place, read_only=True) as store:
        kept, folder = store.runs(), store.path.parent
    sweep = Sweep.from_toml(folder / SWEEP_FILE) if (folder / SWEEP_FILE).is_file() else None
    axis, baseline, orders = _comparison(kept, sweep)
    done: list[ReportedRun] = []
    left: list[Left] = []
    for run in kept:
        read = _read(run, axis)
        if isinstance(read, ReportedRun):
            done.append(read)
        else:
            left.append(read)
    shown = [run for run in done if run.role != "trial"]
    if not shown:
        raise StoreError(_nothing(folder / FILE_NAME, left))
    labels = _ordered({run.label for run in shown}, orders.get(axis, ()))
    return Results(
        runs=tuple(sorted(shown, key=lambda run: (natural(run.seed), run.folder))),
        axis=one_line(axis.rpartition(".")[2]) or "method",
        tasks=_ordered({run.task for run in shown}, orders.get("task", ())),
        labels=labels,
        baseline=one_line(baseline) or labels[0],
        epsilons=tuple(sorted({run.epsilon for run in shown})),
        left=tuple(sorted(left, key=lambda run: (KINDS.index(run.kind), run.folder))),
        num_trials=sum(run.role == "trial" for run in kept),
    )


def found(record: Any, *path: str) -> Any:
    """What stands at `path` of nested tables; None where the path ends before."""
    for name in path:
        record = record.get(name) if isinstance(record, Mapping) else None
    return record


def number(value: Any) -> float | None:
    """A number of JSON, where infinity is the text "inf"; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        read = float(value)
    except ValueError:
        return None
    return None if math.isnan(read) else read


def natural(text: str) -> list[tuple[int, str]]:
    """Key that sorts "10" after "9"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _comparison(kept: Iterable[StoredRun], sweep: Sweep | None) -> tuple[str, str, dict[str, list[str]]]:
    """Axis to compare, its baseline, and labels in order by axis; "task" stands for either name of that axis."""
    if sweep is not None:
        orders = {("task" if a.name in TASK_AXES else a.name): [one_line(v) for v in a.values] for a in sweep.axes}
        return (sweep.compared[0].name, sweep.compared[1], orders) if sweep.compared else ("", "", orders)
    names = dict.fromkeys(name for run in kept for name in run.axes)
    return next((name for name in names if _ordinary(name)), ""), "", {}


def _ordinary(axis: str) -> bool:
    return axis not in (*TASK_AXES, EPSILON_AXIS, SEED_AXIS)


def _read(run: StoredRun, axis: str) -> ReportedRun | Left:
    """The run on its place, or why it has none."""
    if run.status != "done":
        done = f"{len(run.rounds)} rounds are done; run the sweep again, and it goes on"
        return _left(run, "failed", run.error) if run.error else _left(run, "unfinished", done)
    record = run.record if isinstance(run.record, Mapping) else {}
    epsilon, value = number(found(record, "config", "privacy", "epsilon")), number(found(record, "metric", "value"))
    if epsilon is None or value is None or math.isinf(value):
        missing = "config.privacy.epsilon" if epsilon is None else "metric.value"
        return _left(run, "unreadable", f"its record has no {missing}")
    config = record["config"]
    guarantee = _guarantee(record)
    task = next((run.axes[name] for name in TASK_AXES if name in run.axes), found(config, "data", "task"))
    others = [f"{name.rpartition('.')[2]} {run.axes[name]}" for name in run.axes if _ordinary(name) and name != axis]
    label = run.axes.get(axis) or found(config, "adapter", "method") or "unknown method"
    up = number(record.get("bytes_up"))
    return ReportedRun(
        folder=one_line(run.folder, 1000),
        role=run.role,
        digest=one_line(run.digest, 64),
        task=one_line(", ".join([str(task or "unknown task"), *others])),
        label=one_line(label),
        epsilon=epsilon,
        seed=one_line(run.axes.get(SEED_AXIS, found(config, "run", "seed"))),
        metric=one_line(found(record, "metric", "name") or "metric"),
        value=value,
        spent=_spent(record, guarantee),
        guarantee=guarantee,
        sigma=min(_numbers(record, "effective_noise_multiplier"), default=None),
        bytes_up=None if up is None or math.isinf(up) else int(up),
        seconds=number(record.get("wall_seconds")),
        curve=tuple(_curve(run.rounds)),
        unused=sum(map(_unused, run.rounds)),
        record=record,
    )


def _guarantee(record: Mapping[str, Any]) -> Guarantee | None:
    """What the record states; it holds nowhere that the record itself calls its noise seeded."""
    try:
        stated = guarantee_of(record)
        return replace(stated, noise_seeded=stated.noise_seeded or record.get("noise_seeded") is True)
    except (KeyError, TypeError, ValueError):
        return None


def _spent(record: Mapping[str, Any], guarantee: Guarantee | None) -> float | None:
    """Never less than what any site was charged, nor than what the guarantee states."""
    sites = found(record, "privacy", "sites")
    charged = [number(found(site, "epsilon_charged")) for site in sites] if isinstance(sites, list) else []
    stated = [guarantee.epsilon] if guarantee else _numbers(record, "epsilon")
    return max((epsilon for epsilon in (*stated, *charged) if epsilon is not None), default=None)


def _numbers(record: Mapping[str, Any], name: str) -> list[float]:
    """Of every client."""
    clients = record.get("clients")
    values = [number(found(client, name)) for client in clients] if isinstance(clients, list) else []
    return [value for value in values if value is not None]


def _curve(rounds: Sequence[Any]) -> Iterable[tuple[int, float]]:
    for line in rounds:
        place, value = number(found(line, "round")), number(found(line, "metric"))
        if place is not None and value is not None and math.isfinite(place) and math.isfinite(value):
            yield int(place), value


def _unused(line: Any) -> int:
    count = number(found(line, "clients_failed"))
    return 0 if count is None or math.isinf(count) else int(count)


def _left(run: StoredRun, kind: Kind, why: str) -> Left:
    name = ", ".join(f"{axis.rpartition('.')[2]} {label}" for axis, label in run.axes.items())
    return Left(
        kind=kind, folder=one_line(run.folder, 1000), role=run.role, name=one_line(name), why=one_line(why, 500)
    )


def _ordered(seen: set[str], order: Sequence[str]) -> tuple[str, ...]:
    """As the sweep has them, what it does not know behind; a task with other labels goes with its task."""
    places = {name: place for place, name in enumerate(order)}
    return tuple(sorted(seen, key=lambda name: (places.get(name.split(", ")[0], len(places)), natural(name))))


def _nothing(store: Path, left: Sequence[Left]) -> str:
    if not left:
        return f"{store} holds no run that is done; let `fedlora sweep` finish one, then ask for the report"
    counts = ", ".join(f"{sum(run.kind == kind for run in left)} {kind}" for kind in KINDS)
    return (
        f"{store} holds no run that can be reported: {counts}; "
        f"the first, {left[0].folder}: {left[0].why}; mend that and run the sweep again"
    )
