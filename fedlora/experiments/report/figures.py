"""Utility against what it costs, in privacy, bytes and rounds; one panel for each task or ε."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.experiments.report.comparison import Cell, cells_of
from fedlora.experiments.report.guarantees import figure_note
from fedlora.experiments.report.results import ReportedRun, Results
from fedlora.experiments.report.statistics import CONFIDENCE, FEWEST_PAIRS, spread
from fedlora.experiments.report.style import (
    INK,
    EpsilonAxis,
    drawing,
    explain,
    label_handles,
    legend,
    look,
    panels,
    plain,
    save,
)
from fedlora.experiments.report.words import epsilon_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BY_EPSILON = (
    f"Public validation data. Marks: means over seeds, with Student's {CONFIDENCE:.0%} intervals where there are "
    f"{FEWEST_PAIRS} seeds or more; dots: single runs. Marks of one ε stand beside one another to be seen."
)
_BY_BYTES = (
    "Public validation data, means over seeds. Bytes are sent up by all sites together in a whole run. "
    "The paler a mark, the {paler}; hollow: no privacy."
)
_BY_ROUND = "Public validation data. Lines: means over seeds; bands: one standard deviation to either side."


def draw_figures(results: Results, folder: Path) -> list[str]:
    """Write what the records have the numbers for; returns names without endings."""
    cells = cells_of(results)
    names = [_metric_by_epsilon(results, cells, folder)]
    if any(cell.mean_of("bytes_up") for cell in cells):
        names.append(_metric_by_bytes(results, cells, folder))
    return names + [
        name
        for number, task in enumerate(results.tasks)
        if (name := _learning_curves(results, task, folder, f"learning_curves_{number + 1}_{slug(task)}"))
    ]


def slug(text: str) -> str:
    """`text` as part of a file's name."""
    kept = "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in text)
    return "-".join(filter(None, kept.split("-")))[:40] or "task"


def _metric_by_epsilon(results: Results, cells: Sequence[Cell], folder: Path) -> str:
    with drawing() as plt:
        handles = label_handles(results, lines=True)
        figure, axes = panels(plt, len(results.tasks), results.labels)
        for panel, task in zip(axes, results.tasks, strict=True):
            own = [cell for cell in cells if cell.task == task]
            scale = EpsilonAxis(sorted({cell.epsilon for cell in own}))
            for label in results.labels:
                _line_by_epsilon(panel, results, [cell for cell in own if cell.label == label], scale)
            scale.draw(panel)
            _title(panel, own[0])
            panel.set_xlabel("ε asked")
        legend(figure, handles)
        explain(figure, _BY_EPSILON, figure_note(results.runs))
        return save(figure, folder, "metric_by_epsilon")


def _line_by_epsilon(panel: Axes, results: Results, cells: Sequence[Cell], scale: EpsilonAxis) -> None:
    """Mean and interval at every ε; infinity is not joined to the rest."""
    if not cells:
        return
    style, count = look(results, cells[0].label), len(results.labels)
    shift = (results.labels.index(cells[0].label) - (count - 1) / 2) * 0.6 * scale.step / max(count, 4)
    name = plain(cells[0].label)
    for part in ([c for c in cells if math.isfinite(c.epsilon)], [c for c in cells if math.isinf(c.epsilon)]):
        places = [scale.place(cell.epsilon) + shift for cell in part]
        panel.errorbar(
            places,
            [cell.mean for cell in part],
            yerr=[cell.half_width or 0.0 for cell in part],
            **style,
            markersize=4.5,
            linewidth=1.2,
            elinewidth=1,
            capsize=2,
            markeredgecolor="white",
            markeredgewidth=0.5,
            label=name,
        )
    for cell in cells:
        places = [scale.place(cell.epsilon) + shift] * len(cell.runs)
        panel.scatter(places, cell.values, s=5, color=style["color"], alpha=0.45, linewidth=0, zorder=1)


def _metric_by_bytes(results: Results, cells: Sequence[Cell], folder: Path) -> str:
    with drawing() as plt:
        handles = [*label_handles(results, lines=False), *_epsilon_handles(results)]
        figure, axes = panels(plt, len(results.tasks), [handle.get_label() for handle in handles])
        for panel, task in zip(axes, results.tasks, strict=True):
            own = [cell for cell in cells if cell.task == task]
            for cell in own:
                _mark_by_bytes(panel, results, cell)
            _title(panel, own[0])
            panel.set_xlabel("MB sent up")
            panel.set_xlim(left=0)
        legend(figure, handles)
        promised = all(run.promised for run in results.runs if math.isfinite(run.epsilon))
        paler = "more private" if promised else "smaller the ε that was asked for"
        explain(figure, _BY_BYTES.format(paler=paler), figure_note(results.runs))
        return save(figure, folder, "metric_by_bytes")


def _mark_by_bytes(panel: Axes, results: Results, cell: Cell) -> None:
    count = cell.mean_of("bytes_up")
    if count is None:
        return
    style = look(results, cell.label)
    fill = _fill(results, cell.epsilon)
    for face, edge, width in (("white", "none", 0.0), ((style["color"], fill), style["color"], 1.2)):
        panel.scatter(
            count / 1e6, cell.mean, s=34, marker=style["marker"], facecolor=face, edgecolor=edge, linewidth=width
        )


def _fill(results: Results, epsilon: float) -> float:
    """Opacity of a mark: the paler the more private; hollow without privacy."""
    private = [known for known in results.epsilons if math.isfinite(known)]
    return 0.0 if math.isinf(epsilon) else (private.index(epsilon) + 1) / len(private)


def _epsilon_handles(results: Results) -> list[Any]:
    """ε by filling, for a legend."""
    from matplotlib.lines import Line2D

    faces = {e: (INK, _fill(results, e)) if math.isfinite(e) else "white" for e in results.epsilons}
    return [
        Line2D([], [], marker="o", linestyle="", color=INK, markerfacecolor=face, markersize=5, label=epsilon_title(e))
        for e, face in faces.items()
    ]


def _learning_curves(results: Results, task: str, folder: Path, name: str) -> str:
    """A panel for each ε; an empty name where no run was evaluated more than once."""
    runs = [run for run in results.of(task) if len(run.curve) > 1]
    epsilons = sorted({run.epsilon for run in runs})
    if not runs:
        return ""
    with drawing() as plt:
        figure, axes = panels(plt, len(epsilons), results.labels)
        for panel, epsilon in zip(axes, epsilons, strict=True):
            for label in results.labels:
                _curve(panel, results, label, [r for r in runs if (r.label, r.epsilon) == (label, epsilon)])
            panel.set_title(f"{plain(task)}, {epsilon_title(epsilon)}")
            panel.set_ylabel(plain(runs[0].metric.replace("_", " ")))
            panel.set_xlabel("round")
            if panel is not axes[0]:
                panel.sharey(axes[0])
        legend(figure, label_handles(results, lines=True))
        explain(figure, _BY_ROUND, figure_note(runs))
        return save(figure, folder, name)


def _curve(panel: Axes, results: Results, label: str, runs: Sequence[ReportedRun]) -> None:
    points = list(curve_of(runs))
    if not points:
        return
    style = look(results, label)
    rounds, means, stds = zip(*points, strict=True)
    low, high = ([mean + sign * std for mean, std in zip(means, stds, strict=True)] for sign in (-1, 1))
    panel.fill_between(rounds, low, high, color=style["color"], alpha=0.13, linewidth=0)
    panel.plot(rounds, means, **style, markersize=3, linewidth=1.3, label=plain(label))


def curve_of(runs: Sequence[ReportedRun]) -> Iterator[tuple[int, float, float]]:
    """Round, mean and standard deviation of the metric wherever all of the runs were evaluated."""
    curves = [dict(run.curve) for run in runs if run.curve]
    if not curves:
        return
    for place in sorted(set.intersection(*map(set, curves))):
        values = [curve[place] for curve in curves]
        yield place, statistics.fmean(values), spread(values)


def _title(panel: Axes, cell: Cell) -> None:
    panel.set_title(plain(cell.task, 44))
    panel.set_ylabel(plain(cell.runs[0].metric.replace("_", " ")))
