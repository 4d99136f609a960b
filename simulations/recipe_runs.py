"""One run of a recipe in a process of its own, of which the record stays. For grids there is `fedlora sweep`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlora.experiments.runs.publication import without_places


def run_recipe(recipe: Path, record: Path, overrides: Sequence[str], threads: int) -> None:
    """Run `recipe` unless its `record` is there; the record stays, without this machine's paths, the folder goes."""
    if record.exists():
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    folder = record.with_suffix(".run")
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "fedlora", "simulate", str(recipe), "--out", str(folder)]
    command += [part for override in overrides for part in ("--set", override)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    found = json.loads((folder / "record.json").read_text())
    record.write_text(json.dumps({**found, "config": without_places(found["config"])}, indent=2) + "\n")
    shutil.rmtree(folder)
