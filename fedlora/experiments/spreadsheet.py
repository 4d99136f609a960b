"""CSV that a spreadsheet may open, whatever labels people chose."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

_STARTS_A_FORMULA = ("=", "+", "-", "@", "\t")


def csv_text(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A header and rows; None is an empty cell. No text is a formula, numbers are as they are."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_inert, header))
    writer.writerows(map(_inert, row) for row in rows)
    return text.getvalue()


def _inert(value: Any) -> Any:
    """Text that a spreadsheet would compute begins with an apostrophe instead.

    Source: OWASP, CSV Injection.
    """
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ")  # the csv module leaves it bare, and a reader would end the row there
    return f"'{text}" if text.startswith(_STARTS_A_FORMULA) and not _number(text) else text


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
