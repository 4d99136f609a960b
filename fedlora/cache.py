"""A small content-addressed cache on disk: measurements and calibrations that are dear to make and cheap to check.

Nothing private is ever put here. A missing, broken or unwritable cache only costs time.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_folder(kind: str) -> Path:
    """`$FEDLORA_CACHE`, or `fedlora` in the user's cache folder; one sub-folder per kind of entry."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FEDLORA_CACHE") or Path(base) / "fedlora") / kind


def read_entry(kind: str, key: str) -> dict[str, Any] | None:
    """The entry, or None where there is none that can be read."""
    try:
        entry = json.loads((cache_folder(kind) / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) else None


def write_entry(kind: str, key: str, entry: dict[str, Any]) -> None:
    """Write atomically; say nothing where it cannot be written."""
    folder = cache_folder(kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            json.dump(entry, file)
        Path(file.name).replace(folder / f"{key}.json")
    except OSError:
        return
