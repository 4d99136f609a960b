"""A label cannot make a spreadsheet compute."""

from __future__ import annotations

import csv
import io

import pytest

from fedlora.experiments.spreadsheet import csv_text


@pytest.mark.parametrize("label", ["=HYPERLINK(1)", "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\tx"])
def test_text_that_begins_like_a_formula_is_quoted(label: str) -> None:
    written = csv_text(["name", label], [["a", label]])
    header, row = csv.reader(io.StringIO(written, newline=""))
    assert header[1] == row[1] == f"'{label}"


def test_numbers_and_other_texts_are_untouched() -> None:
    cells = [-0.5, "-0.5", "+1e-05", "-inf", "a=b", " -x", "a\r=1", "", None]
    assert csv_text(["a"], [cells]) == "a\n-0.5,-0.5,+1e-05,-inf,a=b, -x,a =1,,\n"
