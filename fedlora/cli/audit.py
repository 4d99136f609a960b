"""`fedlora audit`: attack a recipe's mechanisms and a small run of it, and hold what shows against what is claimed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from fedlora.experiments.audit import Audited
    from fedlora.privacy.audit.finding import Finding
    from fedlora.privacy.audit.noise import NoiseFinding


_WIDTH_OF_A_FILE = 120


class Level(StrEnum):
    MECHANISM = "mechanism"
    TRAINING = "training"
    ALL = "all"


def audit(
    recipe: Annotated[Path | None, typer.Argument(help="TOML recipe; none is the quickstart")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, repeatable")] = None,
    level: Annotated[Level, typer.Option(help="mechanism (crafted gradients), training (canaries in a run) or all")] = (
        Level.ALL
    ),
    trials: Annotated[
        int, typer.Option(help="releases with the record, and as many without", min=100, max=1_000_000)
    ] = 30_000,
    canaries: Annotated[
        int, typer.Option(help="made-up records, each in with probability 1/2", min=20, max=20_000)
    ] = 500,
    out: Annotated[
        Path | None, typer.Option(help="folder, new or empty; default audits/<task>-<method>-<time>")
    ] = None,
) -> None:
    """Look for lies: bounds on ε by attack beside the claimed ε, and a test of the noise. Exit code 4 if one shows."""
    from fedlora.config import RunConfig
    from fedlora.errors import AuditContradiction
    from fedlora.experiments.audit import audit as run

    config = RunConfig.from_toml(recipe, overrides or []) if recipe else RunConfig.from_mapping({}, overrides or [])
    with _TerminalProgress() as progress:
        found = run(config, level=level.value, trials=trials, canaries=canaries, out=out, progress=progress)
    _print_table(found.findings, found.noise)
    if config.privacy.seeded_noise:
        typer.echo("noise seeded: anyone can repeat this audit, and the run it is about is NOT private")
    typer.echo(f"audit folder: {found.folder}")
    if any(row.contradicts for row in found.rows):
        raise AuditContradiction(_contradiction(found))
    typer.echo("no claim contradicted, which proves nothing: a lower bound never shows that something is private")


def _contradiction(found: Audited) -> str:
    """One line: how many rows, and what weighs most."""
    refuted = [finding for finding in found.findings if finding.contradicts]
    count = sum(row.contradicts for row in found.rows)
    if refuted:
        worst = max(refuted, key=lambda finding: finding.bound - finding.evidence.claimed)
        most = f"{worst.evidence.name}: claimed ε = {worst.evidence.claimed:.3f}, at least {worst.bound:.3f}"
    else:
        most = f"{found.noise.name}: {found.noise.what}" if found.noise else ""
    return (
        f"{count} of {len(found.rows)} claims contradicted, most of all {most}; do not trust this ε, see {found.folder}"
    )


def _print_table(findings: Sequence[Finding], noise: NoiseFinding | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from fedlora.experiments.audit import INDEPENDENT
    from fedlora.experiments.terminal import shown_epsilon
    from fedlora.privacy.audit.finding import ERROR

    table = Table(
        box=box.SIMPLE_HEAD,
        caption=f"bounds and test hold together at {1 - ERROR:.0%} confidence",
        caption_justify="left",
    )
    table.add_column("level")
    table.add_column("audited")
    for head in ("claimed", "found"):
        table.add_column(head, justify="right")
    table.add_column("by")
    table.add_column("verdict")
    for finding in findings:
        evidence = finding.evidence
        claimed, found = f"ε = {shown_epsilon(evidence.claimed)}", f"ε ≥ {finding.bound:.3f}"
        _add_row(table, evidence.level, evidence.name, claimed, found, evidence.method, finding)
    if noise is not None:
        found = f"{noise.spread:.3f} σ·C, p = {noise.p_value:.2g}"
        _add_row(table, noise.level, noise.name, INDEPENDENT, found, "test", noise)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH_OF_A_FILE
    console.print(table)


def _add_row(
    table: Table, level: str, name: str, claimed: str, found: str, by: str, row: Finding | NoiseFinding
) -> None:
    table.add_row(level, name, claimed, found, by, row.verdict, style="bold red" if row.contradicts else None)


class _TerminalProgress:
    """One bar per level, with the time left; nothing where nobody watches."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        console = Console()
        self._bar = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def start(self, level: str, total: int) -> None:
        self._task = self._bar.add_task(level, total=total)

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)
