"""What the cells of a sweep would take, before any of them runs: noise, budget, time, and which cannot run at all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fedlora.config import RunConfig
from fedlora.engine.releases import one_thread
from fedlora.errors import FedloraError
from fedlora.experiments.sweeps.duration import PROCESS_SECONDS, Workload, run_seconds, workload_of
from fedlora.experiments.sweeps.speed import Speed, speed_of
from fedlora.experiments.sweeps.sweep import Cell
from fedlora.experiments.terminal import one_line, shown_epsilon, shown_seconds
from fedlora.federation.protection import client_level_of
from fedlora.federation.schedule import make_schedule, planned_steps
from fedlora.federation.shelf import Shelf
from fedlora.federation.sites import load_simulated_data
from fedlora.privacy.phases import FINETUNE
from fedlora.privacy.plan import PrivacyPlan, make_plan

Thing = TypeVar("Thing")

_FILE_WIDTH = 1000


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Of one cell.

    Attributes:
        records: of training, over all sites; 0 where there are none to be found.
        noise_multiplier: smallest and largest effective σ of fine-tuning over the sites; 0 without noise.
        epsilon: what the plan of the worst site spends; ∞ without a guarantee, nan where there is no plan.
        seconds: of the run in a process that has begun; None where it could not be estimated.
        error: why the cell could not run, in one line; empty where it could.
    """

    cell: Cell
    records: int = 0
    noise_multiplier: tuple[float, float] = (0.0, 0.0)
    epsilon: float = math.nan
    seconds: float | None = None
    error: str = ""


def forecast(cells: Sequence[Cell], shelf: Shelf, on_cell: Callable[[Forecast], None] | None = None) -> list[Forecast]:
    """Plan every cell and estimate its time; nothing is trained, no budget is touched and nothing private is released.

    Noise is calibrated as the run would do it, and remembered for it. Speed is measured the first time that a model is
    met on this machine, which takes some seconds.

    Args:
        cells: in order; neighbours that share data and model are quicker.
        shelf: that their records and base model may lie on already.
        on_cell: called with each as soon as it is known.
    """
    forecaster, found = _Forecaster(shelf), []
    with one_thread():  # as a worker of a sweep computes
        for cell in cells:
            found.append(forecaster.of(cell))
            if on_cell is not None:
                on_cell(found[-1])
    return found


class _Forecaster:
    """Remembers what cells have in common, refusals too."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._known: dict[Hashable, Any] = {}

    def of(self, cell: Cell) -> Forecast:
        known: dict[str, Any] = {}
        try:
            sizes = self._sizes(cell.config)
            known["records"] = sum(sizes)
            plans = _plans(cell.config, sizes)
            noise = [plan[FINETUNE].charge().noise_multiplier for plan in plans]
            known |= {
                "noise_multiplier": (min(noise), max(noise)),
                "epsilon": max(plan.epsilon() for plan in plans),
            }
            speed, workload = self._speed(cell.config, plans[0]), self._workload(cell.config)
            known["seconds"] = run_seconds(cell.config, speed, workload, sizes)
        except FedloraError as error:
            known["error"] = one_line(error, 400)
        return Forecast(cell=cell, **known)

    def _sizes(self, config: RunConfig) -> list[int]:
        """n of each client. The records themselves are looked at only to be divided."""

        def count() -> list[int]:
            parts = load_simulated_data(config, self._shelf).parts
            return [len(part) for _, part in sorted(parts.items())]

        return self._once(("sizes", config.data, config.federation.clients, config.run.seed), count)

    def _speed(self, config: RunConfig, plan: PrivacyPlan) -> Speed:
        low_pass, federation = config.privacy.low_pass, config.federation
        key = ("speed", config.model, config.adapter, config.engine, config.run, config.data.task, low_pass, federation)
        return self._once(key, lambda: speed_of(config, plan[FINETUNE], self._shelf))

    def _workload(self, config: RunConfig) -> Workload:
        drawn = config.run.seed if config.data.source == "generated" else None
        key = ("workload", config.data, config.model.name, config.engine.token_budget, config.run.device, drawn)
        return self._once(key, lambda: workload_of(config, self._shelf))

    def _once(self, key: Hashable, find: Callable[[], Thing]) -> Thing:
        if key not in self._known:
            try:
                self._known[key] = find()
            except FedloraError as error:
                self._known[key] = error.with_traceback(None)  # which would keep a model in memory
        found: Thing | FedloraError = self._known[key]
        if isinstance(found, FedloraError):
            raise found
        return found


def _plans(config: RunConfig, sizes: Sequence[int]) -> list[PrivacyPlan]:
    """One a site, straight from its size: a site itself would fingerprint its records, which σ does not need."""
    schedule = make_schedule(config)
    how = client_level_of(config, schedule)
    return [
        make_plan(config, num_examples=size, num_steps=planned_steps(schedule, client), client=client, client_level=how)
        for client, size in enumerate(sizes)
    ]


def print_forecast(forecasts: Sequence[Forecast], workers: int) -> None:
    """A row a cell, what cannot run and why, and how long all of it takes with one worker and with `workers`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH  # a line for each cell
    axes = list(dict.fromkeys(axis for entry in forecasts for axis in entry.cell.axes))
    trials = any(entry.cell.role == "trial" for entry in forecasts)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in (*(["role"] if trials else []), *(axis.rpartition(".")[2] for axis in axes)):
        table.add_column(name, overflow="fold")
    for name in ("records", "σ", "ε spent", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in forecasts:
        labels = [entry.cell.axes.get(axis, "") for axis in axes]
        table.add_row(*([entry.cell.role] if trials else []), *labels, *_numbers(entry))
    console.print(table)
    _print_errors(console, forecasts)
    if any(entry.cell.config.privacy.seeded_noise for entry in forecasts):
        console.print("noise seeded: NOT private, for reproducible research only", style="bold red")
    console.print(_total([entry.seconds for entry in forecasts if entry.seconds is not None], workers), soft_wrap=True)


def _numbers(entry: Forecast) -> tuple[str, str, str, str]:
    if math.isnan(entry.epsilon):
        return f"{entry.records or ''}", "", "", "cannot run"
    low, high = (f"{value:.3g}" for value in entry.noise_multiplier)
    noise = low if low == high else f"{low} to {high}"
    time = "cannot run" if entry.seconds is None else shown_seconds(entry.seconds)
    return str(entry.records), noise, shown_epsilon(entry.epsilon), time


def _print_errors(console: Any, forecasts: Sequence[Forecast]) -> None:
    """Each reason once, with how many cells it stops."""
    for error, count in Counter(entry.error for entry in forecasts if entry.error).items():
        console.print(f"cannot run, {count} of {len(forecasts)} cells: {error}", style="bold red", soft_wrap=True)


def _total(seconds: Sequence[float], workers: int) -> str:
    """The longest cells first is how workers end soonest; they do not know it, so one more cell may be waited for."""
    if not seconds:
        return "no cell can run"
    alone = PROCESS_SECONDS + sum(seconds)
    words = f"{len(seconds)} cells take about {shown_seconds(alone)} one after the other"
    if workers > 1:
        words += f", {shown_seconds(together(seconds, workers))} with {workers} workers"
    return f"{words}: an estimate for one thread each on this machine, with nothing else to do"


def together(seconds: Sequence[float], workers: int) -> float:
    """Until all cells are done by so many workers, each of which takes the next one in order."""
    free = [PROCESS_SECONDS] * workers
    for needed in seconds:
        first = min(range(workers), key=free.__getitem__)
        free[first] += needed
    return max(free)
