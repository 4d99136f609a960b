"""Tables inside pages that people write."""

from __future__ import annotations

from pathlib import Path


def write_between(page: Path, start: str, end: str, text: str) -> None:
    """Replace what stands between the marks `start` and `end` of `page`."""
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}", encoding="utf-8")
