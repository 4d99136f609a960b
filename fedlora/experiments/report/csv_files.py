"""The same numbers for programs: one CSV file for each table, and one with a row for every run."""

from __future__ import annotations

import math
from typing import Any

from fedlora.experiments.report.comparison import Cell, Difference, cells_of, differences_of
from fedlora.experiments.report.guarantees import guarantee_cell
from fedlora.experiments.report.results import Left, ReportedRun, Results
from fedlora.experiments.report.words import epsilon_text
from fedlora.experiments.spreadsheet import csv_text

_PLACE = ("task", "label", "epsilon")
_COST = ("epsilon_spent", "sigma_min", "sigma_max", "bytes_up", "seconds", "guarantee")
_ENDS = ("student_low", "student_high", "bootstrap_low", "bootstrap_high")
_RUN = (
    *("folder", "config_digest", "role", "status", *_PLACE, "seed", "metric", "value", "epsilon_spent", "delta"),
    *("guarantee", "noise_multiplier", "bytes_up", "seconds", "validation_part", "code_digest", "error"),
)


def csv_files(results: Results) -> dict[str, str]:
    """Text by file name."""
    cells = cells_of(results)
    differences = differences_of(results)
    return {
        "metric.csv": csv_text((*_PLACE, "metric", "mean", "std", "n", "best", "guarantee"), map(_metric, cells)),
        "differences.csv": csv_text(
            (*_PLACE, "baseline", "seeds", "mean", *_ENDS, "verdict", "guarantee"),
            [_difference(entry, results.baseline) for entry in differences],
        ),
        "costs.csv": csv_text((*_PLACE, *_COST), map(_cost, cells)),
        "runs.csv": runs_csv(results),
    }


def runs_csv(results: Results) -> str:
    """One row per run that is no trial, whether it is in a table or not."""
    return csv_text(_RUN, [*map(_run, results.runs), *map(_left, results.left)])


def _metric(cell: Cell) -> list[Any]:
    place = [cell.task, cell.label, epsilon_cell(cell.epsilon), cell.runs[0].metric]
    return [*place, cell.mean, cell.std, len(cell.runs), int(cell.best), guarantee_cell(cell.runs)]


def _difference(entry: Difference, baseline: str) -> list[Any]:
    epsilon = "pooled" if entry.epsilon is None else epsilon_cell(entry.epsilon)
    ends = (*entry.student, *entry.bootstrap) if entry.enough else ("",) * 4
    found = [baseline, len(entry.values), entry.mean, *ends, entry.verdict]
    return [entry.task, entry.label, epsilon, *found, guarantee_cell(entry.runs)]


def _cost(cell: Cell) -> list[Any]:
    spent, sigma = cell.range_of("spent"), cell.range_of("sigma")
    return [
        *(cell.task, cell.label, epsilon_cell(cell.epsilon)),
        "" if spent is None else epsilon_cell(spent[1]),
        *(sigma or ("", "")),
        cell.mean_of("bytes_up"),
        cell.mean_of("seconds"),
        guarantee_cell(cell.runs),
    ]


def _run(run: ReportedRun) -> list[Any]:
    promise = run.guarantee
    return [
        *(run.folder, run.digest, run.role, "done", run.task, run.label, epsilon_cell(run.epsilon), run.seed),
        *(run.metric, run.value, "" if run.spent is None else epsilon_cell(run.spent)),
        *(promise.delta if promise else "", str(promise) if promise else "not in the record"),
        *(run.sigma, run.bytes_up, run.seconds, run.validation_part, run.code, ""),
    ]


def _left(entry: Left) -> list[Any]:
    row = dict.fromkeys(_RUN, "") | {"folder": entry.folder, "role": entry.role, "status": entry.kind}
    return list((row | {"label": entry.name, "error": entry.why}).values())


def epsilon_cell(epsilon: float) -> str:
    """As tables print it, never less than it is; infinity as records write it."""
    return "inf" if math.isinf(epsilon) else epsilon_text(epsilon)
