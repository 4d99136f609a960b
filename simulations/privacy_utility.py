"""Accuracy against ε for one recipe: `python -m simulations.privacy_utility simulations/recipes/sst2.toml`.

Runs the recipe at every ε and public seed, keeps each run's record under simulations/results/, and prints the table. A
run whose record is there already is not done again. Every ε uses the same recipe, so rows differ in noise only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def record_file(recipe: Path, epsilon: str, seed: int) -> Path:
    return RESULTS / recipe.stem / f"epsilon-{epsilon}-seed-{seed}.json"


def run_cell(recipe: Path, epsilon: str, seed: int, settings: list[str], threads: int) -> None:
    overrides = [f"privacy.epsilon={epsilon}", f"run.seed={seed}", *settings]
    run_recipe(recipe, record_file(recipe, epsilon, seed), overrides, threads)


def run_recipe(recipe: Path, record: Path, overrides: list[str], threads: int) -> None:
    """One run in a process of its own, unless its `record` is there; the record stays, the run's folder goes."""
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
    record.write_text(json.dumps(without_places(found), indent=2) + "\n")
    shutil.rmtree(folder)


def without_places(record: dict[str, Any]) -> dict[str, Any]:
    """The record without this machine's folders; its config_digest stays that of the config that ran."""
    config = record["config"]
    source = "PATH_TO_GLUE" if config["data"]["source"] not in ("hub", "generated") else config["data"]["source"]
    return {
        **record,
        "config": {**config, "data": {**config["data"], "source": source}, "run": {**config["run"], "out": ""}},
    }


def table(recipe: Path, epsilons: list[str]) -> str:
    """Markdown: mean ± standard deviation over seeds, from the records alone."""
    lines = ["| ε | metric | seeds | σ | spent ε, worst site | sent up by all clients |", "|---|---|---|---|---|---|"]
    for epsilon in epsilons:
        files = sorted(RESULTS.joinpath(recipe.stem).glob(f"epsilon-{epsilon}-seed-*.json"))
        records = [json.loads(file.read_text()) for file in files]
        if not records:
            continue
        values = [record["metric"]["value"] for record in records]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        clients = [client for record in records for client in record["clients"]]
        sigma = max(client["effective_noise_multiplier"] for client in clients)
        spent = max(float(client["epsilon"]) for client in clients)
        lines.append(
            f"| {epsilon.replace('inf', '∞')} | {statistics.mean(values):.3f} ± {spread:.3f} | {len(values)} "
            f"| {sigma:.3f} | {spent:.3f} | {records[0]['bytes_up'] / 1e6:.1f} MB |".replace("inf", "∞")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--epsilons", nargs="+", default=["inf", "6", "3", "1"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", dest="settings", action="append", default=[], help="section.key=value, as in fedlora")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each run")
    chosen = parser.parse_args()
    with ThreadPoolExecutor(chosen.workers) as pool:
        cells = product(chosen.seeds, chosen.epsilons)
        jobs = [pool.submit(run_cell, chosen.recipe, eps, seed, chosen.settings, chosen.threads) for seed, eps in cells]
        for job in jobs:
            job.result()
    print(table(chosen.recipe, chosen.epsilons))


if __name__ == "__main__":
    main()
