"""curve.png says what the numbers mean, also where there is no ε or a single round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from fedlora.experiments.plots import plot_curve

mpl.use("Agg")


def rounds(*epsilons: float | str, every: int = 1) -> list[dict[str, Any]]:
    return [
        {"round": number, "metric": 0.5 + number / 100 if number % every == 0 else None, "epsilon_max": epsilon}
        for number, epsilon in enumerate(epsilons)
    ]


def words(figure: Figure) -> list[str]:
    texts = [text for axes in figure.axes for text in (axes.yaxis.label, *axes.texts)]
    return [text.get_text() for text in (*texts, *figure.texts)] + [figure.get_supxlabel()]


def test_metric_and_epsilon_have_a_panel_each(tmp_path: Path, drawn: list[Figure]) -> None:
    path = tmp_path / "curve.png"
    plot_curve(path, rounds(0.1, 1.0, 1.99991), metric="matthews_correlation", title="t", guarantee="ε = 2 at δ = 1e-5")
    assert {"matthews correlation", "ε, worst site", "0.5200", "2", "ε = 2 at δ = 1e-5"} <= {*words(drawn[0])}
    with Image.open(path) as image:
        assert image.size == (1050, 750)


def test_without_privacy_there_is_no_epsilon_and_it_says_so(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_curve(
        tmp_path / "curve.png", rounds("inf", "inf"), metric="accuracy", title="t", guarantee="no guarantee: ε = ∞"
    )
    assert len(drawn[0].axes) == 1
    assert "no guarantee: ε = ∞" in words(drawn[0])


def test_rounds_without_evaluation_leave_no_gap(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_curve(tmp_path / "curve.png", rounds(1.0, 2.0, 3.0, every=2), metric="accuracy", title="t", guarantee="g")
    gained, spent = (axes.lines[0] for axes in drawn[0].axes)
    assert list(gained.get_xdata()) == [0, 2]
    assert list(spent.get_xdata()) == [0, 1, 2]


def test_one_round_is_enough(tmp_path: Path) -> None:
    plot_curve(tmp_path / "curve.png", rounds(1.0), metric="accuracy", title="t", guarantee="g")
    assert (tmp_path / "curve.png").stat().st_size > 0
