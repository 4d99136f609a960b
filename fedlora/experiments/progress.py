"""What a person sees of a run in a terminal: one row a round, a bar with the time left, and the guarantee in words."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fedlora.adapters.dam import Selection
from fedlora.config import RunConfig
from fedlora.experiments.record import guarantee_of, shown_metric
from fedlora.experiments.terminal import print_rows, shown_bytes, shown_epsilon
from fedlora.federation.server import RoundReport
from fedlora.privacy.units import Guarantee

_ROW = "{round:>5}  {phase:<10}  {metric:>9}  {epsilon:>8}  {up:>9}  {down:>9}  {seconds:>7}  {clients}"


class TerminalProgress:
    """A bar below one row per round; rows stay in the scroll-back."""

    def __init__(self) -> None:
        console = Console(markup=False, highlight=False, soft_wrap=True)  # a name may hold brackets, and is not cut
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rounds, left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None:
        console = self._bar.console
        console.print(
            f"{config.data.task} from {config.data.source}: {config.federation.clients} clients, "
            f"{config.adapter.method} rank {config.adapter.rank}"
        )
        console.print(f"asked: {Guarantee.from_config(config)}")
        if config.privacy.seeded_noise:
            console.print("noise seeded: NOT private, for reproducible research only", style="bold red")
        heads = {"round": "round", "phase": "phase", "metric": metric[:9], "epsilon": "ε spent"}
        console.print(
            _ROW.format(**heads, up="sent up", down="sent down", seconds="time", clients="clients"), style="bold"
        )
        self._bar.start()
        self._task = self._bar.add_task("training", total=num_rounds, completed=done)

    def round(self, report: RoundReport) -> None:
        if report.choice:
            self._bar.console.print(f"{'':>5}  {report.choice}")
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
        self._bar.console.print(row)
        self._bar.advance(self._task)

    def finish(self, record: Mapping[str, Any]) -> None:
        """`print_result` shows it, once the bar is gone."""


def print_result(folder: Path) -> None:
    """Summary of a finished run from its record, which is what counts."""
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    guarantee = guarantee_of(record)
    found, choice = record.get("private_evaluation"), record.get("selection")
    rows = {
        record["metric"]["name"]: shown_metric(record),
        **({"private accuracy": shown_evaluation(found)} if found else {}),
        "guarantee": str(guarantee),
        "not covered": guarantee.not_covered,
        **({"choice": shown_choice(choice)} if choice else {}),
        "traffic": f"{shown_bytes(record['bytes_up'])} up, {shown_bytes(record['bytes_down'])} down",
        "time": f"{record['wall_seconds']:.0f} s, {shown_bytes(record['peak_memory_bytes'])} peak memory",
        "run folder": str(folder),
        "use it": _used(folder, record),
    }
    if guarantee.flaws:
        del rows["not covered"]
    print_rows(rows)


def _used(folder: Path, record: Mapping[str, Any]) -> str:
    """What to do next with a whole model: one site's, where each keeps a part to itself."""
    if record["metric"].get("of") == "shared":
        return "no whole model is here: each site has its own, which its daemon exports after the last round"
    ready = next(iter(sorted((folder / "personal").glob("client-*"))), folder)
    return f'fedlora predict {shlex.quote(str(ready))} "some text"'


def shown_evaluation(found: Mapping[str, Any]) -> str:
    """What a record says of the private evaluation; the error is one standard error, noise and chance together."""
    if found["accuracy"] is None:
        return str(found["note"])
    inside = 0 <= found["accuracy"] <= 1
    return (
        f"{found['accuracy']:.4f} ± {found['standard_error']:.4f} on held-out records of {found['clients']} clients, "
        f"from counts with noise of standard deviation {found['noise_std']:.4g}"
        f"{'' if inside else '; the noise put it outside 0 to 1, and it is shown as it came'}"
    )


def shown_choice(selection: Mapping[str, Any]) -> str:
    """What a record says of the choice of modules."""
    note = f"; {selection['note']}" if selection["note"] else ""
    return f"{Selection.from_json(selection)}{note}"
