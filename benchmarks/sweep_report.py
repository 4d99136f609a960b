"""How long `fedlora report` takes and how large its page is: `python -m benchmarks.sweep_report`.

The records are made up from a real one: metric, seed, ε, method, choice of modules and noise vary, and every run has
the lines of 30 rounds. They say nothing about methods.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine, load_average
from benchmarks.report import RESULTS, command, conditions, save, table
from fedlora.experiments.report import read_results, write_report
from fedlora.experiments.runs.store import Store
from fedlora.experiments.runs.stored_run import StoredRun

REAL = Path(__file__).parents[1] / "simulations" / "results" / "dam" / "sst2-alignment-epsilon-6-seed-0.json"
TASKS, METHODS = (
    ("sst2", "cola", "mrpc", "rte", "qnli"),
    ("FFA-LoRA", "half rank", "random half", "alignment", "bilevel"),
)
EPSILONS, ROUNDS = ("1", "3", "6", "inf"), 30


def made_up_runs(count: int) -> Iterator[StoredRun]:
    """`count` runs over tasks, methods and ε, with as many seeds as that takes."""
    real = json.loads(REAL.read_text(encoding="utf-8"))
    generator = np.random.default_rng(0)
    seeds = range(-(-count // (len(TASKS) * len(METHODS) * len(EPSILONS))))
    places = itertools.product(seeds, TASKS, METHODS, EPSILONS)
    for number, (seed, task, method, epsilon) in enumerate(itertools.islice(places, count)):
        axes = {"task": task, "method": method, "privacy.epsilon": epsilon, "run.seed": str(seed)}
        yield StoredRun(
            folder=f"cells/{number:016x}",
            digest=f"{number:064x}",
            role="cell",
            axes=axes,
            record=_record(real, axes, generator),
            rounds=[{"round": place + 1, "metric": 0.6 + 0.2 * place / ROUNDS} for place in range(ROUNDS)],
        )


def _record(real: dict[str, Any], axes: dict[str, str], generator: np.random.Generator) -> dict[str, Any]:
    record = copy.deepcopy(real)
    epsilon, seed = axes["privacy.epsilon"], int(axes["run.seed"])
    record["config"]["privacy"]["epsilon"] = epsilon if epsilon == "inf" else float(epsilon)
    record["config"]["run"]["seed"], record["config"]["data"]["task"] = seed, axes["task"]
    record["privacy"]["guarantee"]["epsilon"] = epsilon if epsilon == "inf" else 0.999 * float(epsilon)
    record["metric"]["value"] = round(float(generator.normal(0.8, 0.02)), 4)
    record["bytes_up"] = int(generator.integers(2_000_000, 20_000_000))
    record["slots"] = []
    for candidate in record["selection"]["candidates"]:
        candidate["selected"] = bool(generator.random() < 0.5)
        energy = float(generator.uniform(1e-3, 3e-3))
        slot = {"name": f"{candidate['module']}/B", "layer": candidate["layer"], "kind": candidate["type"]}
        record["slots"].append({**slot, "energy": energy, "noise_energy": 1e-3 * generator.random()})
    return record


def measure(count: int) -> dict[str, float]:
    """Seconds and bytes of the report of `count` runs."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        with Store.create(folder) as store:
            for run in made_up_runs(count):
                store.put(run)
        started = time.perf_counter()
        page = write_report(read_results(folder), folder, folder / "report")
        return {
            "runs": count,
            "seconds": time.perf_counter() - started,
            "page_bytes": page.stat().st_size,
            "all_bytes": sum(file.stat().st_size for file in (folder / "report").iterdir()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    machine = {"command": command("benchmarks.sweep_report")} | describe_machine()
    rows = [measure(count) for count in chosen.runs]
    machine["load_average_after"] = load_average()
    shown = [
        (row["runs"], f"{row['seconds']:.1f}", f"{row['page_bytes'] / 1e6:.2f}", f"{row['all_bytes'] / 1e6:.2f}")
        for row in rows
    ]
    markdown = "\n\n".join(
        (
            "# fedlora report",
            f"{len(TASKS)} tasks, {len(METHODS)} methods, {len(EPSILONS)} values of ε, {ROUNDS} rounds a run; as many "
            "seeds as the number of runs takes. Reading the store, tables, figures and page together.",
            table(("runs", "seconds", "report.html, MB", "all files, MB"), shown),
            conditions(machine),
        )
    )
    print(markdown)
    save(chosen.out, "sweep_report", {"machine": machine, "rows": rows}, markdown)


if __name__ == "__main__":
    main()
