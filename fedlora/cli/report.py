"""`fedlora report`: what a sweep found, as tables, figures and one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedlora.experiments.report import Results
    from fedlora.experiments.report.comparison import Cell

_GAP, _LABEL = 2, 10  # signs between columns, and room that a long label gets at the least
_SHOWN: Mapping[str, Mapping[str, bool]] = {
    "mean ± std (seeds)": {"std": True, "seeds": True},
    "mean ± std": {"std": True, "seeds": False},
    "mean": {"std": False, "seeds": False},
}
"""What a table shows of each value: the first for which there is room."""


def report(
    sweep_dir: Annotated[Path, typer.Argument(help="folder of a sweep or of runs, or its runs.sqlite")],
    out: Annotated[Path | None, typer.Option(help="folder of the report; none is report/ beside the store")] = None,
) -> None:
    """Write tables, figures and a page that opens offline from the records of a sweep."""
    from rich.console import Console

    from fedlora.experiments.report import read_results, write_report

    console = Console(markup=False, highlight=False)  # a label may hold brackets
    if not console.is_terminal:
        console.width = 10_000
    results = read_results(sweep_dir)
    place = out or (sweep_dir if sweep_dir.is_dir() else sweep_dir.parent) / "report"
    with Console(stderr=True).status("drawing"):
        page = write_report(results, sweep_dir, place)
    _print(console, results)
    console.print(f"tables   {place / 'tables.md'}, with CSV files and figures beside it", soft_wrap=True)
    console.print(f"page     {page}", soft_wrap=True)


def _print(console: Console, results: Results) -> None:
    """The main result by label and ε, what ε is about, and what is in no table."""
    from fedlora.experiments.report.guarantees import guarantee_words
    from fedlora.experiments.report.tables import left_out

    for task in results.tasks:
        console.print(_table(results, task, console.width))
    for line in guarantee_words(results):
        console.print(line)
    for title, entries in left_out(results):
        console.print(f"{title}; the first, {entries[0].folder}: {entries[0].why}")
    if results.num_trials:
        console.print(f"{results.num_trials} trials for settings are in no table")


def _table(results: Results, task: str, width: int) -> Table:
    """As much of each value as `width` has room for, so that none is folded; labels may be."""
    from rich.table import Table
    from rich.text import Text

    from fedlora.experiments.report.comparison import cells_of

    by_place = {(cell.label, cell.epsilon): cell for cell in cells_of(results) if cell.task == task}
    epsilons = [e for e in results.epsilons if any(epsilon == e for _, epsilon in by_place)]
    labels = [name for name in results.labels if any((name, epsilon) in by_place for epsilon in epsilons)]
    room = width - min(max(map(len, labels)), _LABEL) - _GAP
    what, heads, texts = _fitting(by_place, epsilons, room)
    metric = results.of(task)[0].metric.replace("_", " ")
    table = Table(title=Text(f"{task}: {metric}, {what}"), title_justify="left", box=None, padding=(0, _GAP, 0, 0))
    table.add_column(Text(results.axis), overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for label in labels:
        cells = [by_place.get((label, epsilon)) for epsilon in epsilons]
        shown = [texts.get((label, epsilon), "") for epsilon in epsilons]
        styles = ["bold" if cell and cell.best else "" for cell in cells]
        table.add_row(Text(label), *map(Text, shown, styles))
    return table


def _fitting(
    by_place: Mapping[tuple[str, float], Cell], epsilons: Sequence[float], room: int
) -> tuple[str, list[str], dict[tuple[str, float], str]]:
    """What is shown of each value, heads of the columns, and values by label and ε."""
    from fedlora.experiments.report.tables import value_text
    from fedlora.experiments.report.words import epsilon_title

    for what, parts in _SHOWN.items():
        heads = [epsilon_title(epsilon).replace(" (", "\n(") for epsilon in epsilons]
        if not parts["std"]:
            heads = [head.partition("\n")[0] for head in heads]
        texts = {place: value_text(cell, **parts) for place, cell in by_place.items()}
        lines = [
            [*head.split("\n"), *(t for (_, e), t in texts.items() if e == epsilon)]
            for head, epsilon in zip(heads, epsilons, strict=True)
        ]
        if sum(max(map(len, column)) + _GAP for column in lines) <= room:
            return what, heads, texts
    return what, heads, texts
