"""tables.md: everything a reader of a paper asks of a table, from the store alone, and the same bytes every time."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.experiments.report.comparison import Cell, Difference, cells_of, differences_of
from fedlora.experiments.report.guarantees import guarantee_words
from fedlora.experiments.report.notes import notes_of
from fedlora.experiments.report.results import KINDS, Left, Results
from fedlora.experiments.report.statistics import CONFIDENCE
from fedlora.experiments.report.tuning import tunings_of
from fedlora.experiments.report.words import (
    COSTS,
    PAIRING,
    READING,
    epsilon_text,
    epsilon_title,
    markdown,
    range_text,
    seconds_text,
    size_text,
    spent_of,
)


def tables_text(results: Results) -> str:
    """The whole file, as Markdown."""
    parts = ["# Results", READING, "\n".join(f"- {markdown(line)}" for line in guarantee_words(results))]
    cells, differences = cells_of(results), differences_of(results)
    for task in results.tasks:
        own = [cell for cell in cells if cell.task == task]
        parts += [
            f"## {markdown(task)}: {markdown(own[0].runs[0].metric.replace('_', ' '))}",
            _metric_table(results, own),
            "\n".join(f"- {markdown(note)}" for note in notes_of(results.of(task))),
            *_differences([entry for entry in differences if entry.task == task], results),
            "What they cost:",
            _cost_table(own, results.axis),
        ]
    parts += [PAIRING, COSTS, "## Settings that were searched for", *_tuning(results), "## Left out", *_left(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def value_text(cell: Cell, *, std: bool = True, seeds: bool = True) -> str:
    """Mean, standard deviation where there is one, and number of seeds."""
    spread = "" if cell.std is None or not std else f" ± {cell.std:.4f}"
    return f"{cell.mean:.4f}{spread}{f' ({len(cell.runs)})' if seeds else ''}"


def difference_row(entry: Difference) -> tuple[str, str, str, str, str]:
    """Seeds, mean, Student's interval, the bootstrap's, verdict."""
    if not entry.enough:
        return str(len(entry.values)), f"{entry.mean:+.4f}", "too few", "too few", "too few"
    student, bootstrap = (f"{low:+.4f} to {high:+.4f}" for low, high in (entry.student, entry.bootstrap))
    return str(len(entry.values)), f"{entry.mean:+.4f}", student, bootstrap, entry.verdict


DIFFERENCE_HEADS = ("seeds", "mean difference", f"Student {CONFIDENCE:.0%}", f"bootstrap {CONFIDENCE:.0%}", "verdict")
COST_HEADS = ("runs", "ε spent", "σ", "sent up", "time")


def cost_row(cell: Cell) -> tuple[str, str, str, str, str]:
    return (
        str(len(cell.runs)),
        spent_of(cell),
        "no noise" if cell.range_of("sigma") == (0.0, 0.0) else range_text(cell.range_of("sigma")),
        size_text(cell.mean_of("bytes_up")),
        seconds_text(cell.mean_of("seconds")),
    )


def left_out(results: Results) -> list[tuple[str, Sequence[Left]]]:
    """What is in no table: a line that says so, and the runs."""
    grouped = {kind: [run for run in results.left if run.kind == kind] for kind in KINDS}
    return [(f"{len(runs)} {kind}", runs) for kind, runs in grouped.items() if runs]


def _metric_table(results: Results, cells: Sequence[Cell]) -> str:
    epsilons = [epsilon for epsilon in results.epsilons if any(cell.epsilon == epsilon for cell in cells)]
    by_place = {(cell.label, cell.epsilon): cell for cell in cells}
    rows = []
    for label in results.labels:
        row = [by_place.get((label, epsilon)) for epsilon in epsilons]
        if any(row):
            rows.append([markdown(label), *(_bold(cell) if cell else "" for cell in row)])
    return _table([markdown(results.axis), *map(epsilon_title, epsilons)], rows)


def _bold(cell: Cell) -> str:
    return f"**{value_text(cell)}**" if cell.best else value_text(cell)


def _differences(entries: Sequence[Difference], results: Results) -> list[str]:
    if len(results.labels) < 2:
        return []
    title = f"Paired differences to {markdown(results.baseline)}:"
    if not entries:
        return [title, "None: no run of another label shares ε and seed with one of it."]
    rows = [[markdown(entry.label), epsilon_title(entry.epsilon), *difference_row(entry)] for entry in entries]
    return [title, _table([markdown(results.axis), "ε", *DIFFERENCE_HEADS], rows)]


def _cost_table(cells: Sequence[Cell], axis: str) -> str:
    rows = [[markdown(cell.label), epsilon_text(cell.epsilon), *cost_row(cell)] for cell in cells]
    return _table([markdown(axis), "ε asked", *COST_HEADS], rows)


def _tuning(results: Results) -> list[str]:
    rows = [
        [f.task, f.label, f.epsilons, f.tried, f.chosen_on, f.trained_on, f.values, f.covered, f.note]
        for f in tunings_of(results)
    ]
    if not rows and not results.num_trials:
        return ["No record tells of a search. Settings that were chosen outside of the runs are covered by no ε here."]
    trials = f"{results.num_trials} trials are in the store and in none of the tables above."
    heads = [
        "task",
        results.axis,
        "ε",
        "configurations",
        "chosen on",
        "trained on",
        "settings",
        "privacy",
        "note",
    ]
    return [trials, _table(heads, [[markdown(text) for text in row] for row in rows]) if rows else ""]


def _left(results: Results) -> list[str]:
    found = left_out(results)
    if not found:
        return ["Nothing: every run of the store is in a table or is a trial."]
    return [f"{title}:\n\n" + "\n".join(f"- {markdown(_line(entry))}" for entry in entries) for title, entries in found]


def _line(entry: Left) -> str:
    return f"{entry.role} {entry.folder}{f' ({entry.name})' if entry.name else ''}: {entry.why}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
