"""`fedlora site`: what a data owner runs."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedlora.cli.status import status
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.site.finding import Finding

Settings = Annotated[Path, typer.Argument(help="the site's policy, site.toml", show_default=True)]

site = typer.Typer(name="site", help="The data owner's side: a daemon that holds records, policy and ledger.")

_MARKS = {"good": "✓", "warning": "!", "bad": "✗", "refused": "✗✗"}


@site.command()
def init(
    folder: Annotated[Path, typer.Argument(help="where policy and ledger go; made where it does not exist")] = Path(),
    *,
    task: Annotated[str, typer.Option(help="GLUE task whose columns and labels the records have, such as sst2")],
    data: Annotated[str, typer.Option(help='folder of the records, which are not copied; or "generated"')],
    name: Annotated[str, typer.Option(help="the site's own name for the records; empty: their folder's")] = "",
    model: Annotated[str, typer.Option(help="base model, by name or folder; empty: that of the quickstart")] = "",
    max_epsilon: Annotated[float, typer.Option(help="the most that all runs together may spend")] = 6.0,
    max_delta: Annotated[
        float | None, typer.Option(help="δ of that budget; by default a tenth of 1/n or less", show_default=False)
    ] = None,
    public_size: Annotated[str, typer.Option(help="exact, or a number to plan with in place of n")] = "exact",
) -> None:
    """Make a site: a policy in which every key is explained, and an empty ledger. Overwrites nothing."""
    _ask_no_hub()
    from fedlora.site.setup import NewSite, set_up_site

    asked = NewSite(
        task=task,
        data=data,
        name=name,
        model=model or NewSite.model,
        max_epsilon=max_epsilon,
        max_delta=max_delta,
        public_size=_size(public_size),
    )
    made = set_up_site(folder, asked)
    path, (rules,) = made.policy.path, made.policy.data.values()
    if made.new_folder:
        typer.echo(f"made {folder}, for this user alone")
    typer.echo(f"made {path}: the policy; every key is explained in it")
    typer.echo(f"made {made.policy.ledger}: what is spent; never delete it")
    typer.echo(f"max_epsilon = {rules.max_epsilon:g}: all runs together")
    typer.echo(f"max_delta = {rules.max_delta:g}: {made.delta_from}")
    typer.echo(f"next: fedlora site check {shlex.quote(str(path))}")


@site.command()
def check(
    settings: Settings = Path("site.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Is everything as it should be, and what is to be done? Charges nothing and writes nothing.

    Ends with 0 where a run could start, 2 where something is to be put right, 3 where policy or ledger refuse.
    """
    _ask_no_hub()
    from rich.console import Console

    from fedlora.site.checks import check_site
    from fedlora.site.finding import exit_code

    with Console(stderr=True).status("looking"):
        findings = list(check_site(settings))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=1))
    else:
        _print_findings(findings)
    raise typer.Exit(exit_code(findings))


@site.command()
def serve(
    settings: Settings = Path("site.toml"),
    json_logs: Annotated[bool, typer.Option("--json-logs", help="log one JSON object a line")] = False,
) -> None:
    """Answer the courier's requests until stopped (Ctrl-C, SIGTERM); a round at work is ended first."""
    _ask_no_hub()
    from fedlora.monitoring.logs import configure_logging

    # Before anything else is imported: of libraries, only where they spoke is printed.
    configure_logging("json" if json_logs else "text", speakers=("fedlora.site", "fedlora.monitoring"))
    from fedlora.site.daemon import Daemon
    from fedlora.site.desk import Desk
    from fedlora.site.metrics import shown_metrics

    log, desk = logging.getLogger("fedlora.site"), Desk(settings)
    try:
        with shown_metrics(desk):
            daemon = Daemon(desk)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: daemon.stop())
            log.info("serving", extra={"socket": desk.policy.beside(desk.policy.site.socket)})
            daemon.serve()
    finally:
        desk.close()
    log.info("stopped")


site.command()(status)


def _size(text: str) -> int | Literal["exact"]:
    if text == "exact":
        return "exact"
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"--public-size {text!r} is no number; give exact, or the number to plan with") from error


def _ask_no_hub() -> None:
    """Whatever is named is here or missing. Libraries read these when they are imported."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def _print_findings(findings: Sequence[Finding]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=200)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("check", "found", "to do"):
        table.add_column(column, overflow="fold")  # a digest or path that is cut cannot be compared
    for finding in findings:
        table.add_row(_MARKS[finding.mark], finding.check, finding.found, finding.advice)
    console.print(table)
    worst = [finding.mark for finding in findings]
    for mark, text in (
        ("refused", "✗✗ policy or ledger let nothing run"),
        ("bad", "✗ to be put right"),
        ("warning", "! to be known"),
    ):
        if mark in worst:
            console.print(f"{worst.count(mark)} × {text}")
