"""Whether a text tells a number, such as a record count that stays at its site."""

from __future__ import annotations

import re


def tells(text: str, number: int) -> bool:
    """Whether `number` stands in `text` by itself: a digest, a folder's name or a fraction that has its digits is no
    number, and neither is `1,207` the number 207."""
    return str(number) in re.findall(r"(?<![\w.,-])\d+(?:,\d{3})*(?!\w)", text)
