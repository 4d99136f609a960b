"""dam.png: the Differential Adaptation Matrix of a run, layers by types: scores as colours, the choice as marks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedlora.adapters.dam import Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CHOSEN, _LEFT_OUT = "#4a90c2", "#e9eef2"
_INK, _FAINT = "#222222", "#b9b9b9"

SCORES: Mapping[str, str] = {
    "random": "a number from the public seed",
    "probe": "trace of the tangent kernel,\non public text",
    "alignment": "how far it lowers the loss,\nnoised sum over sites",
    "warmup": "energy of noised updates,\nnoise's share taken off",
    "bilevel": "logit of the gate, noised",
}
"""What a score is, by method; the others have none."""


def plot_selection(path: Path, selection: Selection, *, guarantee: str) -> None:
    """Heat map of the scores with a mark on every chosen module; where a method has no scores, the choice alone.

    Args:
        path: PNG file to write.
        selection: what was chosen, and from what.
        guarantee: what the run promises, printed below.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells a terminal that it builds its font cache
    from matplotlib import pyplot as plt

    layers, kinds, cells = _grid(selection)
    size = max(7.0, 2.6 + 0.85 * len(kinds)), 2.5 + 0.36 * max(len(layers), 4)
    figure, axes = plt.subplots(figsize=size, dpi=150, layout="constrained")
    _draw_cells(figure, axes, selection, cells, (len(layers), len(kinds)))
    chosen = [place for place, taken in zip(cells, selection.mask.chosen, strict=True) if taken]
    axes.scatter(
        [column for _, column in chosen],
        [row for row, _ in chosen],
        s=42,
        color="white",
        edgecolor=_INK,
        linewidth=1.2,
        label="chosen",
    )
    axes.set_xticks(
        range(len(kinds)), [_column_label(kind, column, cells, chosen) for column, kind in enumerate(kinds)]
    )
    axes.set_yticks(range(len(layers)), ["outside" if layer < 0 else str(layer) for layer in layers])
    axes.tick_params(length=0, labelsize=8)
    axes.xaxis.tick_top()
    axes.set_ylabel("layer")
    axes.spines[:].set_visible(False)
    axes.set_title(_title(selection), fontsize=10, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.02), ncols=3, fontsize=8, frameon=False, borderaxespad=0)
    figure.supxlabel("\n".join(filter(None, (selection.note, guarantee))), fontsize=8, color="#444444", wrap=True)
    figure.savefig(path)
    plt.close(figure)


def _grid(selection: Selection) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    """Layers, types in the model's order, and (row, column) of every candidate.

    A model of two stacks has a layer and type twice: the second of them gets a column of its own.
    """
    seen: Counter[tuple[int, str]] = Counter()
    named = []
    for candidate in selection.mask.candidates:
        seen[candidate.layer, candidate.kind] += 1
        again = seen[candidate.layer, candidate.kind]
        named.append((candidate.layer, candidate.kind if again == 1 else f"{candidate.kind} ({again})"))
    layers, kinds = sorted({layer for layer, _ in named}), list(dict.fromkeys(kind for _, kind in named))
    return layers, kinds, [(layers.index(layer), kinds.index(kind)) for layer, kind in named]


def _draw_cells(
    figure: Figure, axes: Axes, selection: Selection, cells: list[tuple[int, int]], shape: tuple[int, int]
) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    values = np.full(shape, np.nan)
    values[tuple(zip(*cells, strict=True))] = selection.scores or np.array(selection.mask.chosen, dtype=float)
    edges = np.arange(shape[1] + 1) - 0.5, np.arange(shape[0] + 1) - 0.5
    if selection.scores:
        largest = float(np.nanmax(np.abs(values))) or 1.0
        signed = min(selection.scores) < 0
        colours, lowest = ("RdBu", -largest) if signed else ("Blues", 0.0)
        mesh = axes.pcolormesh(*edges, values, cmap=colours, vmin=lowest, vmax=largest, edgecolor="white", linewidth=2)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.035, pad=0.02)
        bar.set_label(SCORES.get(selection.method, "score"), fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    else:
        axes.pcolormesh(
            *edges, values, cmap=ListedColormap([_LEFT_OUT, _CHOSEN]), vmin=0, vmax=1, edgecolor="white", linewidth=2
        )
    for number, (row, column) in enumerate(np.argwhere(np.isnan(values))):
        axes.add_patch(
            Rectangle(
                (column - 0.47, row - 0.44),
                width=0.94,
                height=0.88,
                facecolor="none",
                edgecolor=_FAINT,
                hatch="////",
                linewidth=0,
                label="" if number else "no such module",
            )
        )
    axes.invert_yaxis()  # the first layer on top


def _column_label(kind: str, column: int, cells: list[tuple[int, int]], chosen: list[tuple[int, int]]) -> str:
    """A type, folded at its joints, and how many of it were chosen."""
    count = [sum(place[1] == column for place in places) for places in (chosen, cells)]
    return "\n".join((kind.replace("_", "\n").replace(".", ".\n"), f"{count[0]} of {count[1]}"))


def _title(selection: Selection) -> str:
    return f"{selection}\nratio {selection.ratio:.2g}, {selection.discretise if selection.scores else 'no scores'}"
