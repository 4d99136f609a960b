"""Results on disk: `<name>.json` with everything, `<name>.md` with the tables people read."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def command(module: str) -> str:
    """How this benchmark was started, without the folder it writes to."""
    arguments = sys.argv[1:]
    if "--out" in arguments:
        place = arguments.index("--out")
        del arguments[place : place + 2]
    return shlex.join(["python", "-m", module, *arguments])


def conditions(machine: dict[str, Any]) -> str:
    """One paragraph on where the figures come from."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    features = ", ".join(machine["cpu_features"]) or "unknown"
    card = f"{machine['accelerator']}, " if "accelerator" in machine else ""
    before, after = (" ".join(map(str, machine[key])) for key in ("load_average", "load_average_after"))
    return (
        f"`{machine['command']}` on {machine['date']}: {card}{machine['cpu']} ({features}), {machine['cores']} cores, "
        f"{machine['threads']} threads used, load average {before} before and {after} after; "
        f"{versions}."
    )


def save(folder: Path, name: str, facts: dict[str, Any], markdown: str) -> None:
    """Write both files, replacing those of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown.rstrip() + "\n", encoding="utf-8")
    print(f"\nwritten: {folder / name}.json and .md")
