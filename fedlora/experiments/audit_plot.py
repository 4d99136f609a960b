"""audit.png: the two worlds' scores beside one another. Where the colours part, a record shows."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedlora.privacy.audit.finding import Finding
from fedlora.privacy.units import rounded_up

_OUT, _IN = "#1b6ca8", "#b3541e"
_COLUMNS, _BINS = 2, 60


def plot_scores(path: Path, findings: Sequence[Finding]) -> None:
    """One panel per finding: histograms of its attack's scores without and with the record, and the thresholds.

    Args:
        path: PNG file to write.
        findings: in the order of the table.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells a terminal that it builds its font cache
    from matplotlib import pyplot as plt

    rows = math.ceil(len(findings) / _COLUMNS)
    figure, panels = plt.subplots(
        rows, _COLUMNS, figsize=(10, 2.4 * rows), dpi=120, squeeze=False, layout="constrained"
    )
    for axes, finding in zip(panels.flat, findings, strict=False):
        evidence = finding.evidence
        worlds = evidence.without[finding.attack], evidence.with_record[finding.attack]
        bins = _bins(np.concatenate(worlds))
        for scores, label, color in zip(worlds, ("without", "with the record"), (_OUT, _IN), strict=True):
            axes.hist(scores, bins=bins, density=True, histtype="stepfilled", alpha=0.45, color=color, label=label)
        for threshold in finding.thresholds:
            axes.axvline(float(np.clip(threshold, bins[0], bins[-1])), color="#444444", linestyle="--", linewidth=1)
        axes.set_title(
            f"{evidence.name}\nclaimed ε = {_shown(evidence.claimed)}, at least {finding.bound:.2f}: {finding.verdict}",
            fontsize=8,
            loc="left",
        )
        axes.set_xlabel(finding.attack, fontsize=8)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    for axes in panels.flat[len(findings) :]:
        axes.set_visible(False)
    panels[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def _bins(scores: np.ndarray) -> np.ndarray:
    """Edges over all scores, also where they are all the same."""
    low, high = float(scores.min()), float(scores.max())
    margin = 0.5 if low == high else 0.0
    return np.linspace(low - margin, high + margin, _BINS + 1)


def _shown(epsilon: float) -> str:
    return "∞" if math.isinf(epsilon) else f"{rounded_up(epsilon):g}"
