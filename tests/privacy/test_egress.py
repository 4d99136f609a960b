"""The door of a site: agreed vectors and listed facts pass, everything else stays, and no refusal repeats a value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import ProtocolError
from fedlora.privacy.egress import FACTS, MAX_PHASES, MAX_TEXT, PHASE_FACTS, check_facts, check_fields, check_vector

SECRET = 0.123456789
EXAMPLES: dict[type, Any] = {int: 3, float: 0.5, bool: False, str: "gaussian", list: []}
PHASE = {key: EXAMPLES[fact.kind] for key, fact in PHASE_FACTS.items()}
SOUND = {key: EXAMPLES[fact.kind] for key, fact in FACTS.items()} | {"phases": [PHASE, PHASE]}


def test_every_fact_says_why_it_may_leave() -> None:
    assert all(fact.why for fact in (*FACTS.values(), *PHASE_FACTS.values()))
    assert [key for key, fact in FACTS.items() if fact.optional] == ["num_examples"]


def test_listed_facts_pass_with_and_without_the_size() -> None:
    check_facts(SOUND)
    check_facts({key: value for key, value in SOUND.items() if key != "num_examples"})
    check_facts(SOUND | {"epsilon": math.inf})


UNLISTED = ["loss", "accuracy", "grad_norm", "batch_size", "fingerprint", "labels", "seconds", "error", "", "Epsilon"]


@pytest.mark.parametrize("key", UNLISTED)
def test_what_is_not_listed_stays(key: str) -> None:
    for facts in (SOUND | {key: SECRET}, SOUND | {"phases": [PHASE | {key: SECRET}]}):
        with pytest.raises(ProtocolError) as caught:
            check_facts(facts)
        assert str(SECRET) not in str(caught.value)


@pytest.mark.parametrize("key", [key for key in FACTS if key != "num_examples"])
def test_a_fact_that_is_missing_is_noticed(key: str) -> None:
    with pytest.raises(ProtocolError):
        check_facts({other: value for other, value in SOUND.items() if other != key})


WRONG: dict[type, list[Any]] = {
    int: [True, 1.0, -1, "3", None, 2**63, [3]],
    float: [True, -0.5, math.nan, math.inf, "0.5", None],
    bool: [0, 1, "false", None],
    str: [3, None, "x" * (MAX_TEXT + 1), "two\nlines", "\ud800", "nul\0", ["gaussian"]],
    list: [{}, "phases", None, [1], [None], [{}], [PHASE] * (MAX_PHASES + 1), ({},)],
}


@pytest.mark.parametrize("key", FACTS)
def test_a_fact_of_another_type_or_out_of_its_range_stays(key: str) -> None:
    for value in WRONG[FACTS[key].kind]:
        if key == "epsilon" and value == math.inf:
            continue
        with pytest.raises(ProtocolError) as caught:
            check_facts(SOUND | {key: value})
        assert "x" * MAX_TEXT not in str(caught.value)


@pytest.mark.parametrize("facts", [None, [], "facts", 3, {1: 2}, {None: None}])
def test_what_are_no_facts_stays(facts: Any) -> None:
    with pytest.raises(ProtocolError):
        check_facts(facts)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(FACTS)), JSON)
def test_any_value_is_of_its_kind_or_stays(key: str, value: Any) -> None:
    try:
        check_fields(SOUND | {key: value}, FACTS)
    except ProtocolError:
        return
    kind = FACTS[key].kind
    assert type(value) is kind or (kind is float and type(value) is int)
    assert not isinstance(value, float) or value >= 0


@pytest.mark.parametrize(
    "vector",
    [
        torch.full((4,), SECRET),
        torch.full((1, 3), SECRET),
        torch.tensor(SECRET),
        torch.full((3,), SECRET, dtype=torch.float64),
        torch.full((3,), SECRET).half(),
        torch.tensor([SECRET, math.nan, SECRET]),
        torch.tensor([SECRET, SECRET, -math.inf]),
    ],
)
def test_a_vector_that_was_not_agreed_on_stays(vector: torch.Tensor) -> None:
    check_vector(torch.full((3,), SECRET), 3, "client 0")
    with pytest.raises(ProtocolError, match="update of client 0 has") as caught:
        check_vector(vector, 3, "client 0")
    assert "0.12" not in str(caught.value)
