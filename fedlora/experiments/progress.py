"""What a person sees of a run in a terminal: one row a round, a bar with the time left, and the guarantee in words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from fedlora.config import RunConfig
from fedlora.federation.server import RoundReport
from fedlora.privacy.units import Guarantee, rounded_up

_ROW = "{round:>5}  {phase:<9}  {metric:>9}  {epsilon:>8}  {up:>9}  {down:>9}  {seconds:>7}  {clients}"


class TerminalProgress:
    """A bar below one row per round; rows stay in the scroll-back."""

    def __init__(self) -> None:
        self._bar = Bar(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("rounds, left"), TimeRemainingColumn()
        )
        self._task: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def start(self, config: RunConfig, *, metric: str, num_rounds: int, done: int) -> None:
        console = self._bar.console
        console.print(
            f"{config.data.task} from {config.data.source}: {config.federation.clients} clients, "
            f"{config.adapter.method} rank {config.adapter.rank}, "
            f"{'ε = ∞ (no privacy)' if not config.private else f'ε ≤ {config.privacy.epsilon:g}'}",
            highlight=False,
        )
        if config.privacy.seeded_noise:
            console.print("noise seeded: NOT private, for reproducible research only", style="bold red")
        heads = {"round": "round", "phase": "phase", "metric": metric[:9], "epsilon": "ε spent"}
        console.print(
            _ROW.format(**heads, up="sent up", down="sent down", seconds="time", clients="clients"), style="bold"
        )
        self._bar.start()
        self._task = self._bar.add_task("training", total=num_rounds, completed=done)

    def round(self, report: RoundReport) -> None:
        failed = f" ({report.clients_failed} failed)" if report.clients_failed else ""
        row = _ROW.format(
            round=report.round,
            phase=report.phase,
            metric="" if report.metric is None else f"{report.metric:.4f}",
            epsilon=shown_epsilon(report.epsilon_max),
            up=shown_bytes(report.bytes_up),
            down=shown_bytes(report.bytes_down),
            seconds=f"{report.seconds:.1f} s",
            clients=f"{report.clients_ok}{failed}",
        )
        self._bar.console.print(row, highlight=False)
        self._bar.advance(self._task)


def print_result(folder: Path) -> None:
    """Summary of a finished run from its record, which is what counts."""
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    worst = max(record["clients"], key=lambda facts: float(facts["epsilon"]))
    guarantee = Guarantee(
        epsilon=float(worst["epsilon"]),
        delta=worst["delta"],
        accountant=worst["accountant"],
        noise_seeded=record["noise_seeded"],
    )
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    metric = record["metric"]
    table.add_row(metric["name"], f"{metric['value']:.4f} on public {metric['split']}")
    table.add_row("guarantee", str(guarantee))
    if math.isfinite(guarantee.epsilon) and not guarantee.noise_seeded:
        table.add_row("not covered", guarantee.not_covered)
    table.add_row("traffic", f"{shown_bytes(record['bytes_up'])} up, {shown_bytes(record['bytes_down'])} down")
    table.add_row("time", f"{record['wall_seconds']:.0f} s, {shown_bytes(record['peak_memory_bytes'])} peak memory")
    table.add_row("run folder", str(folder))
    table.add_row("use it", f'fedlora predict {folder} "some text"')
    Console().print(table, highlight=False)


def shown_epsilon(epsilon: float) -> str:
    return "∞" if math.isinf(epsilon) else f"{rounded_up(epsilon):g}"


def shown_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
