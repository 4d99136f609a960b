from __future__ import annotations

import pytest

from tests.numbers import tells


@pytest.mark.parametrize(
    "text", ["207", "n = 207.", "(207)", '{"n": 207}', "[5, 207, 9]", "207, 300", "207 records", "`207`", "16/207"]
)
def test_a_number_by_itself_is_told(text: str) -> None:
    assert tells(text, 207)


@pytest.mark.parametrize(
    "text", ["619e207d9", "a207", "0.207", "1,207", "207,000", "1207", "2071", "/pytest-207/x", "207kB"]
)
def test_digits_of_something_else_are_not(text: str) -> None:
    assert not tells(text, 207)
