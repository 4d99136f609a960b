"""How the report's figures look: one colour and mark for each label, everywhere, and the same bytes every time."""

from __future__ import annotations

import itertools
import logging
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.experiments.report.results import Results
from fedlora.experiments.report.words import epsilon_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, with Tol's wine in place of a yellow too faint on white; marks tell labels apart, too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d", "#882255")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">")
INK, FAINT = "#222222", "#8a8a8a"
_PANEL, _GAPS, _FOOT = (3.7, 3.0), (0.75, 0.75), 1.35  # inches: width and height with gaps, gaps, below the last row
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "fedlora",
    "figure.dpi": 100,
    "savefig.dpi": 160,
}


@contextmanager
def drawing() -> Iterator[Any]:
    """`matplotlib.pyplot` without a screen, in the report's style; nothing of it stays behind."""
    import matplotlib as mpl

    mpl.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells a terminal that it builds its font cache
    from matplotlib import pyplot as plt

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a label may be in any script
        yield plt


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write NAME.png and NAME.svg without dates; returns the name."""
    from matplotlib import pyplot as plt

    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return name


def plain(text: str, most: int = 32) -> str:
    """A label as a figure can show it: short, and no formula."""
    return (text if len(text) <= most else f"{text[: most - 1]}…").replace("$", r"\$")


def folded(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def look(results: Results, label: str) -> dict[str, Any]:
    """Colour, mark and line of a label."""
    place = results.labels.index(label)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKS[place % len(MARKS)],
        "linestyle": ("-", "--", ":")[place // len(COLOURS) % 3],
    }


def panels(plt: Any, count: int, names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, three in a row, with room for a legend of `names` above and a caption below.

    Margins are fixed: to find them by drawing everything would take as long as the figure itself.
    """
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    width = max(columns * _PANEL[0], 5.2)
    head = 0.5 + 0.2 * math.ceil(len(names) / legend_columns(width, names))
    height = rows * _PANEL[1] + head + _FOOT - _GAPS[1]
    figure = plt.figure(figsize=(width, height))
    panel = (width - 0.8 - (columns - 1) * _GAPS[0]) / columns, _PANEL[1] - _GAPS[1]
    grid = figure.add_gridspec(
        rows,
        columns,
        left=0.7 / width,
        right=1 - 0.1 / width,
        top=1 - head / height,
        bottom=_FOOT / height,
        wspace=_GAPS[0] / panel[0],
        hspace=_GAPS[1] / panel[1],
    )
    return figure, [figure.add_subplot(grid[place // columns, place % columns]) for place in range(count)]


def explain(figure: Figure, *texts: str) -> None:
    """A caption below everything, each of `texts` from a line of its own and folded to the figure's width."""
    width = int(figure.get_size_inches()[0] * 16)
    caption = "\n".join(folded(text, width) for text in texts if text)
    figure.text(0.01, 0.01, caption, fontsize=7.5, color="#555555", ha="left", va="bottom")


def legend_columns(width: float, names: Sequence[str]) -> int:
    """How many entries fit beside one another in `width` inches."""
    return max(1, int(width / (0.6 + 0.075 * max(map(len, names)))))


def legend(figure: Figure, handles: Sequence[Any]) -> None:
    """One for all panels, above them; each name once."""
    entries = {handle.get_label(): handle for handle in handles}
    columns = legend_columns(figure.get_size_inches()[0], list(entries))
    figure.legend(handles=list(entries.values()), loc="upper left", ncols=columns, fontsize=8, borderaxespad=0.3)


def label_handles(results: Results, *, lines: bool) -> list[Any]:
    """Of every label, for a legend."""
    from matplotlib.lines import Line2D

    looks = {plain(label): look(results, label) for label in results.labels}
    return [
        Line2D([], [], **(found if lines else found | {"linestyle": ""}), markersize=5, label=name)
        for name, found in looks.items()
    ]


class EpsilonAxis:
    """Places of ε: logarithmic, with infinity as a place of its own at the right end."""

    def __init__(self, epsilons: Sequence[float]) -> None:
        self.epsilons = sorted(epsilons)
        finite = [math.log2(epsilon) for epsilon in self.epsilons if math.isfinite(epsilon)]
        steps = [after - before for before, after in itertools.pairwise(finite)]
        self.step = min(steps, default=1.0)
        self._end = (finite[-1] if finite else 0.0) + max(1.2 * max(steps, default=1.0), 1.0)

    def place(self, epsilon: float) -> float:
        return self._end if math.isinf(epsilon) else math.log2(epsilon)

    def draw(self, axes: Axes) -> None:
        """Ticks, and a shade behind infinity."""
        places = [self.place(epsilon) for epsilon in self.epsilons]
        margin = 0.45 * self.step
        axes.set_xlim(places[0] - margin, places[-1] + margin)
        axes.set_xticks(places, [epsilon_text(epsilon) for epsilon in self.epsilons])
        axes.grid(visible=False, axis="x")
        if math.isinf(self.epsilons[-1]):
            axes.axvspan(places[-1] - margin, places[-1] + margin, color="#000000", alpha=0.05, linewidth=0)
            axes.annotate(
                "no privacy",
                (places[-1], 0.015),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=7,
                color="#666666",
            )
