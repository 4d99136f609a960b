"""What report.html is filled with: texts for its template, numbers for its charts. Nothing here is HTML."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedlora.experiments.report.comparison import Cell, Difference, cells_of, differences_of
from fedlora.experiments.report.csv_files import runs_csv
from fedlora.experiments.report.guarantees import guarantee_words, odds
from fedlora.experiments.report.modules import choice_maps, noise_shares
from fedlora.experiments.report.notes import notes_of
from fedlora.experiments.report.results import ReportedRun, Results
from fedlora.experiments.report.style import COLOURS
from fedlora.experiments.report.tables import (
    COST_HEADS,
    DIFFERENCE_HEADS,
    cost_row,
    difference_row,
    left_out,
    value_text,
)
from fedlora.experiments.report.tuning import tunings_of
from fedlora.experiments.report.words import (
    COSTS,
    PAIRING,
    READING,
    epsilon_text,
    epsilon_title,
    seconds_text,
    size_text,
    spent_text,
)

POOLED = ""
"""Stands for no single ε: such rows stay whatever ε is chosen."""


def page_facts(results: Results, *, title: str, folder: Path, out: Path) -> dict[str, Any]:
    """Everything the template asks for.

    Args:
        folder: that the run folders are in; those that are there are linked.
        out: folder of the page, where links start.
    """
    cells, differences = cells_of(results), differences_of(results)
    links = {run.folder: _links(run, folder, out) for run in results.runs}
    return {
        "title": title,
        "axis": results.axis,
        "baseline": results.baseline,
        "labels": results.labels,
        "epsilons": [epsilon_title(epsilon) for epsilon in results.epsilons],
        "tasks": [
            _task(results, place, [c for c in cells if c.task == task], differences)
            for place, task in enumerate(results.tasks)
        ],
        "difference_heads": DIFFERENCE_HEADS,
        "cost_heads": COST_HEADS,
        "reading": READING.replace("**", ""),
        "pairing": PAIRING,
        "costs": COSTS,
        "guarantee": guarantee_words(results),
        "odds": odds(results),
        "runs": [_row(results, place, run, links[run.folder]) for place, run in enumerate(results.runs)],
        "tunings": tunings_of(results),
        "num_trials": results.num_trials,
        "left_out": left_out(results),
        "colours": COLOURS,
        "data": _chart_data(results, cells),
        "csv": base64.b64encode(runs_csv(results).encode()).decode(),
    }


def _task(results: Results, place: int, cells: Sequence[Cell], differences: Sequence[Difference]) -> dict[str, Any]:
    task = results.tasks[place]
    by_place = {(cell.label, cell.epsilon): cell for cell in cells}
    epsilons = [e for e, epsilon in enumerate(results.epsilons) if any(cell.epsilon == epsilon for cell in cells)]
    return {
        "name": task,
        "metric": cells[0].runs[0].metric.replace("_", " "),
        "notes": notes_of(results.of(task)),
        "epsilons": epsilons,
        "rows": [
            (number, label, [_value(by_place.get((label, results.epsilons[e]))) for e in epsilons])
            for number, label in enumerate(results.labels)
            if any((label, results.epsilons[e]) in by_place for e in epsilons)
        ],
        "differences": [
            (*_place(results, entry.label, entry.epsilon), entry.label, *_said(entry))
            for entry in differences
            if entry.task == task
        ],
        "costs": [
            (*_place(results, cell.label, cell.epsilon), cell.label, epsilon_text(cell.epsilon), cost_row(cell))
            for cell in cells
        ],
        "maps": [_map(results, entry) for entry in choice_maps(results) if entry.task == task],
        "noise": _noise(results, task),
    }


def _said(entry: Difference) -> tuple[str, tuple[str, ...]]:
    return epsilon_title(entry.epsilon), difference_row(entry)


def _value(cell: Cell | None) -> tuple[str, bool]:
    return (value_text(cell), cell.best) if cell else ("", False)


def _place(results: Results, label: str, epsilon: float | None) -> tuple[int, int | str]:
    return results.labels.index(label), POOLED if epsilon is None else results.epsilons.index(epsilon)


def _map(results: Results, entry: Any) -> dict[str, Any]:
    label, epsilon = _place(results, entry.label, entry.epsilon)
    rows = [
        (layer, [None if count != count else int(count) for count in counts])  # NaN: no such module
        for layer, counts in zip(entry.layers, entry.counts.tolist(), strict=True)
    ]
    title = f"{entry.label}, {epsilon_title(entry.epsilon)}"
    return {"label": label, "epsilon": epsilon, "title": title, "kinds": entry.kinds, "rows": rows, "n": entry.num_runs}


def _noise(results: Results, task: str) -> dict[str, Any]:
    shares = noise_shares(results, task)
    layers = sorted({layer for own in shares.values() for layer in own})
    rows = [
        (*_place(results, label, epsilon), label, epsilon_text(epsilon), [own.get(layer) for layer in layers])
        for (label, epsilon), own in shares.items()
    ]
    return {"layers": layers, "rows": rows}


def _row(results: Results, place: int, run: ReportedRun, links: Mapping[str, str]) -> dict[str, Any]:
    """A run in the table of all of them; what is sorted by stands beside what is shown."""
    label, epsilon = _place(results, run.label, run.epsilon)
    return {
        "place": place,
        "task": results.tasks.index(run.task),
        "label": label,
        "epsilon": epsilon,
        "links": links,
        "cells": [
            (run.task, run.task),
            (run.label, label),
            (epsilon_text(run.epsilon), epsilon),
            (run.seed, run.seed),
            (f"{run.value:.4f}", run.value),
            (spent_text(run), -1 if run.spent is None else run.spent),
            (size_text(run.bytes_up), run.bytes_up or 0),
            (seconds_text(run.seconds), run.seconds or 0),
        ],
    }


def _links(run: ReportedRun, folder: Path, out: Path) -> dict[str, str]:
    """Words and relative address of what there is of a run's own folder."""
    place = folder / run.folder
    known = {"privacy report": place / "PRIVACY.md", "record": place / "record.json", "run folder": place}
    try:
        return {words: quote(os.path.relpath(path, out)) for words, path in known.items() if path.exists()}
    except (OSError, ValueError):  # a name that no file can have
        return {}


def _chart_data(results: Results, cells: Sequence[Cell]) -> dict[str, Any]:
    """For the page's own script, which draws; places stand for names."""
    guarantees = list(dict.fromkeys(_promise(run) for run in results.runs))
    return {
        "tasks": [{"name": t, "metric": results.of(t)[0].metric.replace("_", " ")} for t in results.tasks],
        "labels": results.labels,
        "epsilons": [
            {"text": epsilon_text(epsilon), "value": None if epsilon == float("inf") else epsilon}
            for epsilon in results.epsilons
        ],
        "guarantees": guarantees,
        "cells": [
            {
                "task": results.tasks.index(cell.task),
                "label": results.labels.index(cell.label),
                "epsilon": results.epsilons.index(cell.epsilon),
                "half": cell.half_width,
            }
            for cell in cells
        ],
        "runs": [_run_data(results, run, guarantees) for run in results.runs],
    }


def _run_data(results: Results, run: ReportedRun, guarantees: Sequence[str]) -> list[Any]:
    """In the order in which report.js names them."""
    label, epsilon = _place(results, run.label, run.epsilon)
    return [
        *(results.tasks.index(run.task), label, epsilon, run.seed, round(run.value, 6), spent_text(run)),
        *(None if run.sigma is None else f"{run.sigma:.4g}", run.bytes_up, run.seconds, run.digest[:16]),
        *(guarantees.index(_promise(run)), [[place, round(value, 5)] for place, value in run.curve]),
    ]


def _promise(run: ReportedRun) -> str:
    """Without the ε of this very run, so that runs share their text."""
    if run.guarantee is None:
        return "The record states no guarantee."
    if run.guarantee.flaws:
        return f"No guarantee: {'; '.join(run.guarantee.flaws)}."
    held = run.guarantee
    about = f"for one {held.unit} of one site ({held.relation})"
    return f"δ = {held.delta:g}, {about}, by {held.accountant.upper()} accounting."
