"""What a person sees of a sweep in a terminal: one row a cell, and a bar with the time left."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.experiments.sweeps.sweep import Cell
from fedlora.experiments.terminal import shown_epsilon


class SweepProgress:
    """A bar below one row per cell that has ended; rows stay in the scroll-back."""

    def __init__(self) -> None:
        self.console = Console(markup=False, highlight=False, soft_wrap=True)  # a label may hold brackets
        self._bar = Bar(
            TextColumn("{task.fields[ended]}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("so far, left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            disable=not self.console.is_terminal,
            speed_estimate_period=3600,  # cells end in bursts
        )
        self._task: Any = None
        self._done = self._failed = self._total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def start(self, *, total: int, done: int) -> None:
        self._total, self._done = total, done
        if done:
            self.console.print(f"{done} of {total} cells are done already")
        self._bar.start()
        self._task = self._bar.add_task("", total=total, completed=done, ended=self._ended())

    def ended(self, cell: Cell, run: StoredRun) -> None:
        self._done += 1
        self._failed += run.status == "failed"
        role = "trial, " if cell.role == "trial" else ""
        self.console.print(f"{self._done:>5}/{self._total}  {_result(run):<44}  {role}{cell.name}")
        if run.error:
            self.console.print(f"{'':>7}{run.error}")
        self._bar.update(self._task, completed=self._done, ended=self._ended())

    def _ended(self) -> str:
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._done} of {self._total} cells{failed}"

    def look(self, started: float) -> None:
        self._bar.update(self._task, completed=self._done + started)


def _result(run: StoredRun) -> str:
    if run.record is None:
        return "failed"
    metric, spent = run.record["metric"], run.epsilon_spent or 0.0
    return f"{metric['name']} {metric['value']:.4f}  ε {shown_epsilon(spent)}  {run.record['wall_seconds']:.0f} s"
