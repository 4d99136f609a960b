"""Notes with the time in them, one JSON object a line. Standard library only, as it travels with apps."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


def note(path: str | Path, **facts: object) -> None:
    """Append one line."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def read_notes(path: Path) -> list[dict[str, float]]:
    """What was noted so far; a line that is being written is left out."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def process_started(pid: int | str = "self") -> float:
    """When a process of this machine began, as `time.time()` counts, to a hundredth of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age
