"""`fedlora report`: what a sweep found, as tables, figures and one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fedlora.experiments.report import Results


def report(
    sweep_dir: Annotated[Path, typer.Argument(help="folder of a sweep or of runs, or its runs.sqlite")],
    out: Annotated[Path | None, typer.Option(help="folder of the report; none is report/ beside the store")] = None,
) -> None:
    """Write tables, figures and a page that opens offline from the records of a sweep."""
    from rich.console import Console

    from fedlora.experiments.report import read_results, write_report

    console = Console(markup=False, highlight=False)  # a label may hold brackets
    results = read_results(sweep_dir)
    place = out or (sweep_dir if sweep_dir.is_dir() else sweep_dir.parent) / "report"
    with Console(stderr=True).status("drawing"):
        page = write_report(results, sweep_dir, place)
    _print(console, results)
    console.print(f"tables   {place / 'tables.md'}, with CSV files and figures beside it", soft_wrap=True)
    console.print(f"page     {page}", soft_wrap=True)


def _print(console: Console, results: Results) -> None:
    """The main result: mean ± standard deviation by label and ε, and what is in no table."""
    from rich.table import Table
    from rich.text import Text

    from fedlora.experiments.report.comparison import cells_of
    from fedlora.experiments.report.tables import left_out, value_text
    from fedlora.experiments.report.words import epsilon_title

    cells = cells_of(results)
    for task in results.tasks:
        by_place = {(cell.label, cell.epsilon): cell for cell in cells if cell.task == task}
        epsilons = [e for e in results.epsilons if any(epsilon == e for _, epsilon in by_place)]
        metric = results.of(task)[0].metric.replace("_", " ")
        table = Table(title=Text(f"{task}: {metric}, mean ± std (seeds)"), title_justify="left")
        table.add_column(Text(results.axis))
        for epsilon in epsilons:
            table.add_column(epsilon_title(epsilon).replace(" (", "\n("), justify="right")
        for label in results.labels:
            row = [by_place.get((label, epsilon)) for epsilon in epsilons]
            if any(row):
                found = [
                    Text(value_text(cell), style="bold" if cell.best else "") if cell else Text("") for cell in row
                ]
                table.add_row(Text(label), *found)
        console.print(table)
    for title, entries in left_out(results):
        console.print(f"{title}; the first, {entries[0].folder}: {entries[0].why}")
    if results.num_trials:
        console.print(f"{results.num_trials} trials for settings are in no table")
