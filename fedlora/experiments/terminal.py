"""Facts of a run as a person reads them in a terminal. Loads no torch."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Mapping

from rich.console import Console

from fedlora.privacy.units import rounded_up


def print_rows(rows: Mapping[str, str]) -> None:
    """Names and texts in two columns. A terminal folds long texts between words; a file gets a line for each."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    column = max(map(len, rows)) + 2
    for name, text in rows.items():
        console.print(
            textwrap.fill(
                text,
                width=console.width if console.is_terminal else sys.maxsize,
                initial_indent=f"{name:<{column}}",
                subsequent_indent=" " * column,
                break_long_words=False,  # a path that is cut cannot be copied
                break_on_hyphens=False,
            )
        )


def shown_epsilon(epsilon: float) -> str:
    return "∞" if math.isinf(epsilon) else f"{rounded_up(epsilon):g}"


def shown_spent(epsilon: float, status: str) -> str:
    """ε of a stored run; only where it is done do its rounds tell all: those that died were charged, too."""
    if status == "done" or math.isinf(epsilon):
        return shown_epsilon(epsilon)
    return f"at least {shown_epsilon(epsilon)}{', not ended' if status == 'unfinished' else ''}"


def shown_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def shown_seconds(seconds: float) -> str:
    """As people say it, with few figures."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 570:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def one_line(text: object, most: int = 200) -> str:
    """Without control characters, which a name from elsewhere may hold, and not longer than a reader can bear."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
