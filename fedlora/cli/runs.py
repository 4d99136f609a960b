"""`fedlora runs`: what is known of the runs in a folder, one against another, and without some of them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

if TYPE_CHECKING:
    from rich.table import Table

    from fedlora.experiments.runs.gathering import Gathered

runs = typer.Typer(name="runs", help="List, show, compare and remove runs.", no_args_is_help=True)
Folder = Annotated[Path, typer.Option("--in", help="a sweep's folder or a folder of runs")]
DEFAULT = Path("runs")


@runs.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="a sweep's folder, a folder of runs, or a store of them")] = DEFAULT,
    task: Annotated[str | None, typer.Option(help="only this task, or this label of a sweep")] = None,
    method: Annotated[str | None, typer.Option(help="only this method, or this label")] = None,
    epsilon: Annotated[float | None, typer.Option(help="only this ε, as it was asked for; inf")] = None,
    status: Annotated[str | None, typer.Option(help="done, failed or unfinished")] = None,
    role: Annotated[str | None, typer.Option(help="cell (of a sweep), trial (for its settings) or run")] = None,
    where: Annotated[str | None, typer.Option(help="SQL expression on the columns that --csv has")] = None,
    sort: Annotated[str, typer.Option(help="a column that --csv has; -COLUMN for the largest first")] = "axes",
    as_csv: Annotated[bool, typer.Option("--csv", help="for spreadsheets")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs; ε = ∞ is written as inf")] = False,
) -> None:
    """Which runs are there, what did they reach and what did they spend? Unfinished ones are listed too."""
    from fedlora.errors import ConfigError
    from fedlora.experiments.run_folder import to_json
    from fedlora.experiments.runs.store import COLUMNS
    from fedlora.schema import require_known

    if as_csv and as_json:
        raise ConfigError("--csv and --json are two notations of one list; leave one of them out")
    if status:
        require_known(status, ("done", "failed", "unfinished"), "status", f"--status {status}")
    if role:
        require_known(role, ("cell", "trial", "run"), "role", f"--role {role}")
    column = sort.removeprefix("-")
    require_known(column, COLUMNS, "column", f"--sort {sort}")
    wanted = {"task": task, "method": method, "epsilon": epsilon, "status": status, "role": role}
    values = {name: value for name, value in wanted.items() if value is not None}
    with _gathered(folder).store as store:
        known = len(store.stamps())
        rows = store.select(where or "TRUE", equal=values, order=column, descending=sort != column)
    if as_json:
        typer.echo(json.dumps(to_json(rows), indent=1))
    elif as_csv:
        typer.echo(_csv(rows), nl=False)
    else:
        if rows:
            _print_table(rows)
        else:
            typer.echo(
                f"none of the {known} runs in {folder} is like that; without a filter all are listed"
                if known
                else f"no runs in {folder} yet"
            )
        _print_sweeps(folder)


@runs.command()
def show(
    run: Annotated[str, typer.Argument(help="its folder's name, or how that or its digest begins")],
    folder: Folder = DEFAULT,
) -> None:
    """All that is known of one run: settings, guarantee, what each client spent, results, traffic, versions."""
    from fedlora.experiments.runs.portrait import print_portrait

    with (gathered := _gathered(folder)).store:
        print_portrait(gathered.find(run))


@runs.command()
def diff(
    left: Annotated[str, typer.Argument(help="a run, as for show")],
    right: Annotated[str, typer.Argument(help="the run to compare it with")],
    folder: Folder = DEFAULT,
) -> None:
    """What differs between two runs: settings, code and versions, results."""
    from fedlora.experiments.runs.portrait import print_differences

    with (gathered := _gathered(folder)).store:
        print_differences(gathered.find(left), gathered.find(right))


@runs.command()
def rm(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="runs, as for show")],
    folder: Folder = DEFAULT,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Remove runs with their folders. Privacy that they spent stays spent: no ledger of a site is changed."""
    from fedlora.errors import StoreError
    from fedlora.experiments.runs.removal import check_removable, clear_removed, remove_run

    if folder.is_file():
        raise StoreError(f"{folder} is a store without run folders; give the folder that the runs lie in")
    with (gathered := _gathered(folder)).store:
        found = list(dict.fromkeys(gathered.find(name).folder for name in names))
    for run in found:
        check_removable(folder, run)
    typer.echo(
        f"removes {', '.join(found)} in {folder}, with adapter, record and all. That gives no budget back: what these "
        "runs spent on their records stays spent, and the ledger of a policy is left as it is"
    )
    if not yes and not _confirmed():
        typer.echo("nothing was removed")
        return
    for run in found:
        remove_run(folder, run)
        typer.echo(f"removed {run}")
    clear_removed(folder)


@runs.command()
def export(
    out: Annotated[Path, typer.Argument(help="a new folder for the store to publish")],
    folder: Folder = DEFAULT,
) -> None:
    """A copy of the store for others: every record whole, without the paths of this machine."""
    from fedlora.experiments.runs.publication import export_runs
    from fedlora.experiments.terminal import one_line

    for complaint in export_runs(folder, out):
        typer.echo(f"fedlora: {one_line(complaint, 1000)}", err=True)
    typer.echo(f"store    {out / 'runs.sqlite'}; fedlora report {shlex.quote(str(out))} makes its tables and figures")


def _confirmed() -> bool:
    from fedlora.errors import ConfigError

    try:
        return typer.confirm("remove?")
    except click.Abort:
        raise ConfigError("nobody answered and nothing was removed; --yes removes without asking") from None


def _gathered(folder: Path) -> Gathered:
    from fedlora.experiments.runs.gathering import gather
    from fedlora.experiments.terminal import one_line

    gathered = gather(folder)
    for complaint in gathered.complaints:
        typer.echo(f"fedlora: {one_line(complaint, 1000)}", err=True)
    return gathered


def _csv(rows: list[dict[str, Any]]) -> str:
    """One column for each axis of a sweep, behind the rest."""
    from fedlora.experiments.spreadsheet import csv_text

    axes = list(dict.fromkeys(axis for row in rows for axis in row["axes"]))
    columns = [name for name in (rows[0] if rows else ()) if name != "axes"]
    cells = ([*(row[name] for name in columns), *(row["axes"].get(axis, "") for axis in axes)] for row in rows)
    return csv_text([*columns, *(f"axis {axis}" for axis in axes)], cells)


def _print_table(rows: list[dict[str, Any]]) -> None:
    """A line for each run, whatever reads it; what a narrow terminal has no room for is in `fedlora runs show`."""
    from rich.console import Console

    from fedlora.experiments.terminal import one_line

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    columns, unlimited = _columns(rows), console.options.update(width=10_000)
    for name in ("metric", "time", "method", "task"):
        if console.measure(_table(columns), options=unlimited).maximum > console.width:
            del columns[name]
    console.print(_table(columns))
    for row, name in zip(rows, columns["run"], strict=True):
        if row["error"]:
            typer.echo(f"{name} failed: {one_line(row['error'], 1000)}")


def _print_sweeps(folder: Path) -> None:
    """Where else runs are: a sweep keeps its own."""
    for sweep in sorted(folder.glob("*/sweep.toml")):
        typer.echo(f"a sweep: fedlora runs list {shlex.quote(str(sweep.parent))}")


def _table(columns: dict[str, list[str]]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns:
        right = name in ("ε spent", "value", "time")
        table.add_column(name, justify="right" if right else "left", overflow="fold", min_width=min(8, len(name)))
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    from fedlora.experiments.terminal import one_line

    columns = {
        "run": _short_names([row["folder"] for row in rows]),
        "cell": [
            ", ".join(f"{axis.rpartition('.')[2]} {label}" for axis, label in row["axes"].items()) for row in rows
        ],
        "task": [row["task"] or "" for row in rows],
        "method": [row["method"] or "" for row in rows],
        "ε spent": [_spent(row) for row in rows],
        "value": ["" if row["value"] is None else f"{row['value']:.4f}" for row in rows],
        "metric": [_metric(row) for row in rows],
        "time": ["" if row["wall_seconds"] is None else f"{row['wall_seconds']:.0f} s" for row in rows],
        "status": [_status(row) for row in rows],
    }
    return {name: [*map(one_line, cells)] for name, cells in columns.items() if name != "cell" or any(cells)}


def _short_names(folders: list[str]) -> list[str]:
    """As much of each as `fedlora runs show` needs: cells are named by long digests."""
    names = [folder.rpartition("/")[2] for folder in folders]
    length = next((size for size in (8, 12) if len({name[:size] for name in names}) == len(names)), None)
    return [name[:length] if "/" in folder else folder for folder, name in zip(folders, names, strict=True)]


def _spent(row: dict[str, Any]) -> str:
    from fedlora.experiments.terminal import shown_spent

    if row["epsilon_spent"] is None:
        return "unknown, not ended" if row["status"] == "unfinished" else ""
    spent = shown_spent(row["epsilon_spent"], row["status"])
    return f"not private ({spent})" if row["private"] == 0 and spent != "∞" else spent  # its noise was seeded


def _metric(row: dict[str, Any]) -> str:
    """Its name and, where that is not the run's one model, whose it is."""
    of = {"own": ", own models", "shared": ", shared part"}.get(row["metric_of"], "")
    return f"{row['metric'] or ''}{of}"


def _status(row: dict[str, Any]) -> str:
    return f"unfinished, rounds so far: {row['rounds_done']}" if row["status"] == "unfinished" else str(row["status"])
