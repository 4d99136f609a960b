"""How often each module was chosen: a block of layers by types for each label and ε, on one canvas to be drawn fast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedlora.experiments.report.modules import ChoiceMap
from fedlora.experiments.report.style import FAINT, drawing, explain, plain, save
from fedlora.experiments.report.words import epsilon_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CAPTION = (
    "In how many runs each module was chosen; the darker, the more often: white never, darkest always. "
    "Hatched: no such module."
)
_CELL = 0.3  # inches
_GAP, _HEAD, _FOOT, _LEFT = 1.2, 1.9, 6.0, 1.6  # in cells: between blocks, above one, below the last, left of the first


def draw_choices(maps: Sequence[ChoiceMap], note: str, folder: Path, name: str) -> str:
    """Write NAME.png and NAME.svg for the maps of one task, with a `note` on their ε; returns the name."""
    labels, epsilons = list(dict.fromkeys(m.label for m in maps)), sorted({m.epsilon for m in maps})
    rows, columns = max(len(m.layers) for m in maps) + _HEAD, max(len(m.kinds) for m in maps) + _GAP
    width, height = len(epsilons) * columns + _LEFT, len(labels) * rows + _FOOT + 1.6
    with drawing() as plt:
        figure = plt.figure(figsize=(max(width * _CELL, 5.2), height * _CELL))
        axes = figure.add_axes((0, 0, width * _CELL / figure.get_size_inches()[0], 1))
        axes.set(xlim=(-_LEFT, width - _LEFT), ylim=(height - 1.6, -1.6))
        axes.axis("off")
        axes.text(-_LEFT + 0.3, -1.0, plain(maps[0].task, 60), fontsize=11, va="center")
        for entry in maps:
            corner = epsilons.index(entry.epsilon) * columns, labels.index(entry.label) * rows + _HEAD
            _block(axes, entry, corner)
        for place, epsilon in enumerate(epsilons):
            last = [m for m in maps if m.epsilon == epsilon][-1]
            _kinds(axes, last, (place * columns, labels.index(last.label) * rows + _HEAD + len(last.layers)))
        explain(figure, _CAPTION, note)
        return save(figure, folder, name)


def _block(axes: Axes, entry: ChoiceMap, corner: tuple[float, float]) -> None:
    """One map with its counts; `corner` is its upper left."""
    from matplotlib.patches import Rectangle

    left, top = corner
    layers, kinds = entry.counts.shape
    edges = left + np.arange(kinds + 1), top + np.arange(layers + 1)
    share = entry.counts / entry.num_runs
    axes.pcolormesh(*edges, share, cmap="Blues", vmin=0, vmax=1, edgecolor="white", linewidth=1)
    axes.add_patch(Rectangle(corner, kinds, layers, facecolor="none", edgecolor=FAINT, linewidth=0.5))
    for row, column in np.ndindex(*share.shape):
        place = left + column, top + row
        if np.isnan(share[row, column]):
            axes.add_patch(Rectangle(place, 1, 1, facecolor="none", edgecolor=FAINT, hatch="////", linewidth=0))
            continue
        ink = "white" if share[row, column] > 0.55 else "#333333"
        count = f"{entry.counts[row, column]:.0f}"
        axes.text(place[0] + 0.5, place[1] + 0.52, count, ha="center", va="center", fontsize=6.5, color=ink)
    runs = "1 run" if entry.num_runs == 1 else f"{entry.num_runs} runs"
    axes.text(left, top - 0.8, plain(entry.label, 24), fontsize=8, va="bottom")
    axes.text(left, top - 0.15, f"{epsilon_title(entry.epsilon)}, {runs}", fontsize=7, va="bottom", color="#555555")
    for row, layer in enumerate(entry.layers):
        axes.text(left - 0.15, top + row + 0.5, layer, fontsize=6, ha="right", va="center", color="#555555")


def _kinds(axes: Axes, entry: ChoiceMap, corner: tuple[float, float]) -> None:
    """Types of modules, below the last block of a column."""
    left, bottom = corner
    for column, kind in enumerate(entry.kinds):
        words = plain(kind.replace("_", " "), 22)
        axes.text(left + column + 0.5, bottom + 0.2, words, fontsize=6.5, rotation=90, ha="center", va="top")
