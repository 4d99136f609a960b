"""dam.png marks what was chosen where it is, whatever the model's shape, and claims no scores that there were not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from fedlora.adapters.dam import Candidate, ModuleMask, Selection
from fedlora.experiments.selection_plot import SCORES, plot_selection

mpl.use("Agg")
TYPES = ("query", "key", "value", "attention_output", "up", "down")
GUARANTEE = "ε = 2 at δ = 1e-5"


def selection(
    places: Sequence[tuple[int, str]], chosen: Sequence[bool], scores: Sequence[float] = (), **changes: Any
) -> Selection:
    candidates = tuple(
        Candidate(module=f"m{number}", layer=layer, kind=kind, in_features=4, out_features=4)
        for number, (layer, kind) in enumerate(places)
    )
    facts = {
        "method": "alignment" if scores else "all",
        "discretise": "global_topk" if scores else "none",
        "noise_to_signal": None,
        "stability": None,
        "diagnostics": {},
        "note": "",
    }
    return Selection(
        mask=ModuleMask(candidates, tuple(chosen)),
        ratio=sum(chosen) / len(chosen),
        scores=tuple(scores),
        **{**facts, **changes},
    )


def marks(figure: Figure) -> set[tuple[int, int]]:
    """(row, column) of every mark."""
    return {(round(row), round(column)) for column, row in figure.axes[0].collections[-1].get_offsets()}


def cells(figure: Figure) -> np.ma.MaskedArray[Any, Any]:
    return figure.axes[0].collections[0].get_array()  # type: ignore[return-value]


def labels(figure: Figure, axis: str) -> list[str]:
    return [text.get_text() for text in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


def test_every_cell_has_its_score_and_every_chosen_one_its_mark(tmp_path: Path, drawn: list[Figure]) -> None:
    places = [(layer, kind) for layer in range(3) for kind in TYPES]
    scores = [float(number) for number in range(18)]
    plot_selection(
        tmp_path / "dam.png",
        selection(places, [number in (0, 7, 17) for number in range(18)], scores),
        guarantee=GUARANTEE,
    )
    (figure,) = drawn
    assert np.array_equal(cells(figure), np.arange(18.0).reshape(3, 6))
    assert marks(figure) == {(0, 0), (1, 1), (2, 5)}
    assert figure.axes[0].yaxis_inverted(), "the first layer is on top"
    assert labels(figure, "x")[0] == "query\n1 of 3"
    assert labels(figure, "x")[3] == "attention\noutput\n0 of 3"
    assert labels(figure, "y") == ["0", "1", "2"]
    assert figure.axes[0].get_title(loc="left") == "alignment chose 3 of 18 modules\nratio 0.17, global_topk"
    assert figure.get_supxlabel() == GUARANTEE
    with Image.open(tmp_path / "dam.png") as image:
        assert image.width == round(150 * (2.6 + 0.85 * 6))


@pytest.mark.parametrize(
    ("scores", "limits"),
    [((1.0, 3.0), (0.0, 3.0)), ((-1.0, 3.0), (-3.0, 3.0)), ((-4.0, 3.0), (-4.0, 4.0)), ((0.0, 0.0), (0.0, 1.0))],
)
def test_colours_part_at_zero_where_scores_have_a_sign(
    tmp_path: Path, drawn: list[Figure], scores: tuple[float, ...], limits: tuple[float, float]
) -> None:
    plot_selection(tmp_path / "dam.png", selection([(0, "up"), (1, "up")], [True, False], scores), guarantee=GUARANTEE)
    assert drawn[0].axes[0].collections[0].get_clim() == limits


@pytest.mark.parametrize("method", ["all", "mask"])
def test_without_scores_there_is_no_scale(tmp_path: Path, drawn: list[Figure], method: str) -> None:
    chosen = [True, method == "all"]
    plot_selection(tmp_path / "dam.png", selection([(0, "up"), (1, "up")], chosen, method=method), guarantee=GUARANTEE)
    (figure,) = drawn
    assert len(figure.axes) == 1
    assert figure.axes[0].get_title(loc="left").endswith("no scores")
    assert cells(figure).ravel().tolist() == [float(part) for part in chosen]


@pytest.mark.parametrize("method", SCORES)
def test_the_scale_says_what_a_score_is(tmp_path: Path, drawn: list[Figure], method: str) -> None:
    chosen = selection([(0, "up"), (1, "up")], [True, False], [1.0, 2.0], method=method)
    plot_selection(tmp_path / "dam.png", chosen, guarantee=GUARANTEE)
    assert drawn[0].axes[1].get_ylabel() == SCORES[method]


def test_layers_may_differ_types_may_be_paths_and_a_module_may_lie_outside(tmp_path: Path, drawn: list[Figure]) -> None:
    places = [(-1, "project"), (0, "query"), (0, "attention.self.in_proj"), (1, "query"), (11, "pos_proj")]
    chosen = [False, True, True, False, True]
    note = "no signal stood out"
    made = selection(places, chosen, [0.0, 1.0, 2.0, 3.0, 4.0], note=note)
    plot_selection(tmp_path / "dam.png", made, guarantee=GUARANTEE)
    (figure,) = drawn
    assert labels(figure, "y") == ["outside", "0", "1", "11"]
    assert labels(figure, "x")[2] == "attention.\nself.\nin\nproj\n1 of 1"
    assert marks(figure) == {(1, 1), (1, 2), (3, 3)}
    assert cells(figure).mask.sum() == 16 - 5
    holes = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert len(holes) == 16 - 5
    assert figure.get_supxlabel() == f"{note}\n{GUARANTEE}"


def test_a_model_of_two_stacks_shows_both(tmp_path: Path, drawn: list[Figure]) -> None:
    chosen = selection([(0, "q"), (1, "q"), (0, "q"), (1, "q")], [True, False, False, True], [1.0, 2.0, 3.0, 4.0])
    plot_selection(tmp_path / "dam.png", chosen, guarantee=GUARANTEE)
    assert labels(drawn[0], "x") == ["q\n1 of 2", "q (2)\n1 of 2"]
    assert cells(drawn[0]).tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert marks(drawn[0]) == {(0, 0), (1, 1)}
