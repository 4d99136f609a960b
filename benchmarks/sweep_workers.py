"""How much sooner a sweep ends with more workers: `python -m benchmarks.sweep_workers`.

Small cells of MiniLM on the generated corpus, with seeded noise, so that the records of every number of workers can be
compared. Beside them one worker with all threads, and a loop of `fedlora simulate` as people write it in a shell: a new
process for every cell.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tomli_w

from benchmarks.machine import describe_machine, load_average
from benchmarks.report import RESULTS, command, conditions, save, table
from benchmarks.spread import Spread, ratios, take_turns
from fedlora.experiments.runs.store import Store
from fedlora.experiments.sweeps.sweep import Sweep

SETTINGS = {
    "model": {"dtype": "bfloat16", "attention": "eager"},
    "data": {"generated_records": 1200},
    "federation": {"rounds": 3, "local_steps": 2},
    "training": {"expected_batch_size": 32},
    "privacy": {"delta": 1e-4, "seeded_noise": True},
    "run": {"evaluate_every": 3},
}
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1"}


def write_sweep(folder: Path, cells: int) -> Path:
    grid = {"run": {"seed": list(range(cells // 2))}, "privacy": {"epsilon": [6.0, 1.0]}}
    file = folder / "sweep.toml"
    file.write_text(tomli_w.dumps({"set": SETTINGS, "grid": grid}))
    return file


def sweep(file: Path, workers: int, threads: int) -> tuple[float, dict[str, Any]]:
    """Wall-clock seconds, report included, and each cell's metrics and bytes by its digest."""
    with TemporaryDirectory() as place:
        out = Path(place) / "out"
        options = ["--workers", str(workers), "--threads", str(threads), "--out", str(out)]
        seconds = _timed([sys.executable, "-m", "fedlora", "sweep", str(file), *options], ENVIRONMENT)
        with Store.open(out, read_only=True) as store:
            return seconds, {run.digest: run.record and (run.record["metrics"], run.rounds[-1]) for run in store.runs()}


def shell_loop(file: Path) -> tuple[float, dict[str, Any]]:
    """One cell after the other, each in a new process with one thread; no report."""
    seconds = 0.0
    with TemporaryDirectory() as place:
        for number, cell in enumerate(Sweep.from_toml(file).cells()):
            recipe = Path(place) / f"{number}.toml"
            recipe.write_text(cell.config.to_toml())
            options = [str(recipe), "--out", str(Path(place) / str(number))]
            environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
            seconds += _timed([sys.executable, "-m", "fedlora", "simulate", *options], environment)
    return seconds, {}


def _timed(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def alike(results: list[dict[str, Any]]) -> bool:
    """Whether all sweeps found the same, seconds aside."""
    return all(_without_seconds(found) == _without_seconds(results[0]) for found in results)


def _without_seconds(found: dict[str, Any]) -> dict[str, Any]:
    return {digest: (kept[0], {**kept[1], "seconds": 0}) for digest, kept in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", type=int, default=12)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    machine = {"command": command("benchmarks.sweep_workers")} | describe_machine()
    one = "1 worker"
    with TemporaryDirectory() as place:
        file = write_sweep(Path(place), chosen.cells)
        contenders: dict[str, Callable[[], tuple[float, dict[str, Any]]]] = {
            one: partial(sweep, file, 1, 1),
            **{f"{count} workers": partial(sweep, file, count, 1) for count in (2, 4) if count <= cores},
            f"1 worker, {cores} threads": partial(sweep, file, 1, cores),
            "a shell loop over fedlora simulate": partial(shell_loop, file),
        }
        found = take_turns(contenders, chosen.turns, random.Random(0))
    machine["load_average_after"] = load_average()
    seconds = {name: [turn[0] for turn in turns] for name, turns in found.items()}
    same = alike([turn[1] for name, turns in found.items() if "threads" not in name for turn in turns if turn[1]])
    rows = [(name, Spread.of(taken), ratios(seconds[one], taken)) for name, taken in seconds.items()]
    markdown = "\n\n".join(
        (
            "# Workers of a sweep",
            f"{chosen.cells} cells of 6 private steps; smallest / median / largest of {chosen.turns} turns. The "
            f"records of all sweeps with one thread a cell are {'the same' if same else 'NOT the same'}.",
            table(("", "seconds", "times as fast as one worker"), rows),
            conditions(machine),
        )
    )
    print(markdown)
    facts = {"machine": machine, "seconds": seconds, "records_alike": same}
    save(chosen.out, "sweep_workers", facts, markdown)


if __name__ == "__main__":
    main()
