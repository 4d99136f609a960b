"""curve.png: what the run gained, round by round, and what it cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.privacy.units import rounded_up

_GAINED, _SPENT = "#1b6ca8", "#b3541e"


def plot_curve(path: Path, rounds: Sequence[Mapping[str, Any]], *, metric: str, title: str, guarantee: str) -> None:
    """Metric over rounds and, below it, ε of the worst site; ε is left out where it is infinite.

    Args:
        path: PNG file to write.
        rounds: lines of rounds.jsonl.
        metric: name of the headline.
        title: what ran.
        guarantee: what the last ε means, or why there is none; printed below.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells a terminal that it builds its font cache
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    scored = [(entry["round"], entry["metric"]) for entry in rounds if entry["metric"] is not None]
    spent = [(entry["round"], entry["epsilon_max"]) for entry in rounds if entry["epsilon_max"] != "inf"]
    ratios = [2, 1] if spent else [1]
    figure, panels = plt.subplots(
        len(ratios), figsize=(7, 5), dpi=150, sharex=True, squeeze=False, height_ratios=ratios, layout="constrained"
    )
    shown = f"{scored[-1][1]:.4f}", f"{rounded_up(spent[-1][1]):g}" if spent else ""
    curves = [(scored, shown[0], metric.replace("_", " "), _GAINED), (spent, shown[1], "ε, worst site", _SPENT)]
    for axes, (points, last, label, color) in zip(panels[:, 0], curves, strict=False):
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=color, clip_on=False)
        axes.annotate(last, points[-1], (6, 0), textcoords="offset points", va="center", color=color)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if spent:
        panels[1, 0].set_ylim(bottom=0)
    panels[0, 0].set_title(f"{title}: public validation", fontsize=11, loc="left")
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[-1, 0].set_xlabel("round")
    figure.supxlabel(guarantee, fontsize=8, color="#444444")
    figure.savefig(path)
    plt.close(figure)
