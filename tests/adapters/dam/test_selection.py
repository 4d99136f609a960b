from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from fedlora.adapters.dam import Candidate, ModuleMask, Selection
from fedlora.errors import AdapterError, RunFolderError

Candidates = tuple[Candidate, ...]


def selection(candidates: Candidates, **facts: Any) -> Selection:
    few = candidates[:2]
    given: dict[str, Any] = {
        "mask": ModuleMask(few, (False, True)),
        "method": "probe",
        "discretise": "global_topk",
        "ratio": 0.5,
        "scores": (0.25, 2.0),
        "noise_to_signal": None,
        "stability": None,
        "diagnostics": {"lambda_min": (0.5, -1.0)},
        "note": "made for a test",
    }
    return Selection(**{**given, **facts})


def test_the_form_on_disk(candidates: Candidates) -> None:
    assert selection(candidates).to_json() == {
        "method": "probe",
        "discretise": "global_topk",
        "ratio": 0.5,
        "noise_to_signal": None,
        "stability": None,
        "note": "made for a test",
        "candidates": [
            {
                "module": "encoder.layer.0.query",
                "layer": 0,
                "type": "query",
                "in_features": 4,
                "out_features": 4,
                "score": 0.25,
                "selected": False,
                "lambda_min": 0.5,
            },
            {
                "module": "encoder.layer.0.key",
                "layer": 0,
                "type": "key",
                "in_features": 4,
                "out_features": 4,
                "score": 2.0,
                "selected": True,
                "lambda_min": -1.0,
            },
        ],
    }


@pytest.mark.parametrize(
    "facts",
    [{}, {"noise_to_signal": 3.5}, {"noise_to_signal": math.inf}, {"scores": ()}, {"diagnostics": {}}],
    ids=str,
)
def test_what_was_written_is_read_back(candidates: Candidates, facts: dict[str, Any]) -> None:
    written = selection(candidates, **facts)
    text = json.dumps(written.to_json(), allow_nan=False)
    assert Selection.from_json(json.loads(text)) == written


def test_infinity_is_a_word(candidates: Candidates) -> None:
    assert selection(candidates, noise_to_signal=math.inf).to_json()["noise_to_signal"] == "inf"


def test_no_scores_are_nulls(candidates: Candidates) -> None:
    assert [row["score"] for row in selection(candidates, scores=()).to_json()["candidates"]] == [None, None]


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"ratio": 1.0}, "a ratio of 1.0 for 1 chosen of 2"),
        ({"scores": (1.0,)}, "score of modules: 1 values, wanted 2"),
        ({"scores": (1.0, math.nan)}, "wanted 2 finite"),
        ({"diagnostics": {"lambda_min": (1.0, 2.0, 3.0)}}, "lambda_min of modules: 3 values"),
        ({"diagnostics": {"trace": (1.0, math.inf)}}, "trace of modules"),
        ({"diagnostics": {"selected": (1.0, 0.0)}}, "diagnostics named selected"),
        ({"noise_to_signal": -1.0}, "noise-to-signal ratio"),
        ({"noise_to_signal": math.nan}, "noise-to-signal ratio"),
    ],
    ids=str,
)
def test_a_selection_does_not_contradict_itself(candidates: Candidates, facts: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        selection(candidates, **facts)


def first_row(**facts: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["candidates"][0].update(facts)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("method"),
        lambda content: content.pop("candidates"),
        lambda content: content.update(candidates=[]),
        lambda content: content.update(candidates={}),
        lambda content: content.update(candidates=["encoder.layer.0.query"]),
        lambda content: content.update(ratio=1.0),
        lambda content: content.update(ratio="0.5"),
        lambda content: content.update(note=None),
        lambda content: content.update(noise_to_signal="much"),
        lambda content: content.update(noise_to_signal=-1),
        lambda content: content.update(noise_to_signal=math.nan),
        lambda content: content["candidates"].pop(),
        lambda content: content["candidates"][1].pop("selected"),
        lambda content: content["candidates"][0].pop("lambda_min"),
        first_row(selected=1),
        first_row(selected=True),
        first_row(layer=True),
        first_row(layer=0.0),
        first_row(module=None),
        first_row(score=None),
        first_row(score=math.inf),
        first_row(score=10**400),
        first_row(lambda_min="low"),
        first_row(extra=1.0),
    ],
)
def test_damage_is_refused(candidates: Candidates, damage: Callable[[dict[str, Any]], Any]) -> None:
    content = selection(candidates).to_json()
    damage(content)
    with pytest.raises(RunFolderError, match=r"a selection is broken: .*choose anew"):
        Selection.from_json(content)


@pytest.mark.parametrize("content", [[], None, "selection", 3])
def test_something_else_is_refused(content: Any) -> None:
    with pytest.raises(RunFolderError, match="a selection is broken"):
        Selection.from_json(content)
