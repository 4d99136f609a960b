"""curve.png: what the run gained, round by round, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_curve(path: Path, rounds: Sequence[Mapping[str, Any]], *, metric: str, title: str, guarantee: str) -> None:
    """Metric (left axis) and ε of the worst site (right axis) over rounds; ε is left out where it is infinite."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, left = plt.subplots(figsize=(7, 4), dpi=150)
    scored = [entry for entry in rounds if entry["metric"] is not None]
    left.plot([e["round"] for e in scored], [e["metric"] for e in scored], marker="o", markersize=3, color="#1b6ca8")
    left.set_xlabel("round")
    left.set_ylabel(f"{metric} (public validation)", color="#1b6ca8")
    left.grid(alpha=0.25)
    spent = [(entry["round"], entry["epsilon_max"]) for entry in rounds if entry["epsilon_max"] != "inf"]
    if spent:
        right = left.twinx()
        right.plot(*zip(*spent, strict=True), color="#b3541e", linestyle="--")
        right.set_ylabel("ε spent, worst site", color="#b3541e")
        right.set_ylim(bottom=0)
    left.set_title(title, fontsize=10)
    figure.text(0.5, 0.01, guarantee, ha="center", fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path)
    plt.close(figure)
