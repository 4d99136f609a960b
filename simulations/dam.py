"""What choosing modules gains under privacy: `python -m simulations.dam PATH_TO_GLUE`.

Runs one short recipe with all modules, with query and value, with half of the modules chosen by each search, and with
two controls: half of them at random, and all of them at half the rank. Every run has the same rounds, steps and ε, a
search's own among them. Keeps each run's record and writes the tables of docs/dam.md from the records alone. A run
whose record is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from fedlora.adapters.dam import Selection, discretise, overlap
from fedlora.experiments.report.statistics import CONFIDENCE, interval, spread, verdict
from simulations.page import write_between
from simulations.recipe_runs import run_recipe

HERE = Path(__file__).parent
RECIPE, RESULTS = HERE / "recipes" / "dam.toml", HERE / "results" / "dam"
PAGE = HERE.parent / "docs" / "dam.md"
START, END = "<!-- tables: python -m simulations.dam -->", "<!-- end of tables -->"
TASKS: dict[str, tuple[str, ...]] = {
    "quickstart": (
        "data.task=sst2",
        "data.source=generated",
        "federation.rounds=10",
        "federation.local_steps=10",
        "training.learning_rate=8.0",
        "training.expected_batch_size=128",
        "adapter.search_rounds=2",
        "run.evaluate_every=10",
    ),
    "generated": ("data.task=sst2", "data.source=generated"),
    "sst2": ("data.task=sst2",),
    "cola": ("data.task=cola",),
    "mrpc": ("data.task=mrpc", "training.expected_batch_size=96", "data.max_length=64"),
}
"""Settings beside the recipe's. The quickstart has 100 steps, all others 6; the generated corpus is easy enough for a
few noisy steps to show."""
MOST_RECORDS = 9000
"""Of a real task: the first rows of a public shuffle. A prototype release looks at every record, in every run."""
ALL, CONTROLS = "all", ("random", "half-rank")
VARIANTS: dict[str, tuple[str, ...]] = {
    ALL: ("adapter.select=all",),
    "query-value": (),
    "half-rank": ("adapter.select=all", "adapter.rank=4", "adapter.alpha=4"),
    "random": ("adapter.select=random",),
    "probe": ("adapter.select=probe",),
    "warmup": ("adapter.select=warmup",),
    "alignment": ("adapter.select=alignment",),
    "bilevel": ("adapter.select=bilevel",),
}
SEARCHES = ("probe", "warmup", "alignment", "bilevel")
EPSILONS = ("inf", "6", "3", "1")
ORDER = ("6", "inf", "1", "3")
"""Of work: what is cut short still compares noise with none."""
Record = dict[str, Any]


def record_file(task: str, variant: str, epsilon: str, seed: int) -> Path:
    return RESULTS / f"{task}-{variant}-epsilon-{epsilon}-seed-{seed}.json"


@cache
def read_record(task: str, variant: str, epsilon: str, seed: int) -> Record | None:
    file = record_file(task, variant, epsilon, seed)
    return json.loads(file.read_text()) if file.exists() else None


def run_cell(task: str, variant: str, epsilon: str, seed: int, settings: Sequence[str], threads: int) -> None:
    overrides = [f"privacy.epsilon={epsilon}", f"run.seed={seed}", *settings, *TASKS[task], *VARIANTS[variant]]
    run_recipe(RECIPE, record_file(task, variant, epsilon, seed), overrides, threads)


def smaller_copy(source: Path, folder: Path) -> Path:
    """The real tasks of `source` with at most MOST_RECORDS training records each, as a folder of the same kind.

    Not `data.train_share`, which takes other records: what is in RESULTS was made of these, and is compared with what
    is added.
    """
    for settings in TASKS.values():
        task = settings[0].partition("=")[2]
        (folder / task).mkdir(exist_ok=True)
        for file in (source / task).glob("*.parquet"):
            table = parquet.read_table(file)
            if file.stem == "train" and len(table) > MOST_RECORDS:
                table = table.take(np.random.default_rng(0).permutation(len(table))[:MOST_RECORDS])
            parquet.write_table(table, folder / task / file.name)
    return folder


def seeds_of(task: str, *cells: tuple[str, str]) -> list[int]:
    """Seeds that all of the cells (variant, ε) have a record of."""
    found = [
        {int(file.stem.rpartition("-")[2]) for file in RESULTS.glob(f"{task}-{variant}-epsilon-{epsilon}-seed-*.json")}
        for variant, epsilon in cells
    ]
    return sorted(set.intersection(*found))


def metrics(task: str, variant: str, epsilon: str, seeds: Iterable[int]) -> list[float]:
    records = (read_record(task, variant, epsilon, seed) for seed in seeds)
    return [float(record["metric"]["value"]) for record in records if record is not None]


def utility_table(task: str) -> str:
    """Metric by variant and ε, mean ± standard deviation over seeds."""
    lines = [f"| {task} | " + " | ".join(f"ε = {_shown(epsilon)}" for epsilon in EPSILONS) + " |"]
    lines.append("|---" * (len(EPSILONS) + 1) + "|")
    for variant in VARIANTS:
        if not any(seeds_of(task, (variant, epsilon)) for epsilon in EPSILONS):
            continue
        cells = []
        for epsilon in EPSILONS:
            values = metrics(task, variant, epsilon, seeds_of(task, (variant, epsilon)))
            shown = f"{statistics.mean(values):.3f} ± {spread(values):.3f}" if values else ""
            cells.append(shown if len(values) in (0, 3) else f"{shown} ({len(values)})")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference_table(task: str) -> str:
    """Each search against each control, paired by seed; a seed counts once, by its mean over the private ε it has."""
    lines = [f"| {task} | against | seeds | mean difference | {CONFIDENCE:.0%} interval | verdict |", "|---" * 6 + "|"]
    for variant, control in product(SEARCHES, (*CONTROLS, ALL)):
        by_seed: dict[int, list[float]] = {}
        for epsilon in EPSILONS:
            if epsilon == "inf":
                continue
            seeds = seeds_of(task, (variant, epsilon), (control, epsilon))
            pairs = zip(metrics(task, variant, epsilon, seeds), metrics(task, control, epsilon, seeds), strict=True)
            for seed, (own, other) in zip(seeds, pairs, strict=True):
                by_seed.setdefault(seed, []).append(own - other)
        differences = [statistics.mean(found) for found in by_seed.values()]  # of one seed they are not independent
        if differences:
            lines.append(
                f"| {variant} | {control} | {len(differences)} | {statistics.mean(differences):+.4f} | "
                f"{interval(differences)} | {verdict(differences)} |"
            )
    return "\n".join(lines)


def stability_table() -> str:
    """Overlap of each search's mask with that of the same search without noise, mean over seeds; random: 1/2."""
    lines = ["| task | search | " + " | ".join(f"ε = {_shown(e)}" for e in EPSILONS if e != "inf") + " |"]
    lines.append("|---" * (len(EPSILONS) + 1) + "|")
    for task, variant in product(TASKS, SEARCHES):
        cells = []
        for epsilon in (e for e in EPSILONS if e != "inf"):
            seeds = seeds_of(task, (variant, "inf"), (variant, epsilon))
            found = [overlap(_mask(task, variant, "inf", s), _mask(task, variant, epsilon, s)) for s in seeds]
            cells.append(f"{statistics.mean(found):.2f}" if found else "")
        if any(cells):
            lines.append(f"| {task} | {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def release_noise_table() -> str:
    """What the noise of the alignment release alone does to its mask: the scores of runs without noise, noised anew."""
    multipliers, draws = (5.0, 10.0, 20.0, 40.0), 200
    lines = ["| task | " + " | ".join(f"σ = {multiplier:g}" for multiplier in multipliers) + " |"]
    lines.append("|---" * (len(multipliers) + 1) + "|")
    for task in TASKS:
        records = [read_record(task, "alignment", "inf", seed) for seed in seeds_of(task, ("alignment", "inf"))]
        cells = [
            statistics.mean(_overlap_under_noise(record, multiplier, draws) for record in records if record)
            for multiplier in multipliers
            if records
        ]
        if cells:
            lines.append(f"| {task} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def _overlap_under_noise(record: Record, multiplier: float, draws: int) -> float:
    """Mean overlap of the mask with that of the same scores under the noise of every site's release."""
    exact, adapter = Selection.from_json(record["selection"]), record["config"]["adapter"]
    generator, std = np.random.default_rng(0), multiplier * math.sqrt(record["config"]["federation"]["clients"])
    found = []
    for _ in range(draws):
        noised = (np.array(exact.scores) + generator.normal(0, std, len(exact.scores))).tolist()
        mask = discretise(exact.mask.candidates, noised, how=adapter["discretise"], ratio=adapter["ratio"])
        found.append(overlap(exact.mask, mask))
    return statistics.mean(found)


def uplink_table() -> str:
    """Bytes that one site sends in a round of fine-tuning, and what LoRA (A and B) would send for the same modules."""
    lines = ["| variant | modules | B only (FFA-LoRA), kB | A and B (LoRA), kB |", "|---" * 4 + "|"]
    for variant in VARIANTS:
        record = read_record("sst2", variant, "6", 0)
        if record is None:
            continue
        sent = next(entry for entry in record["privacy"]["vectors_out"] if entry["phase"] == "finetune")
        rank, hidden = record["config"]["adapter"]["rank"], _input_sizes(record)
        factors = sum(4 * rank * hidden[slot["name"].removesuffix("/B")] for slot in sent["slots"])
        lines.append(
            f"| {variant} | {len(sent['slots'])} | {sent['bytes'] / 1e3:.1f} | {(sent['bytes'] + factors) / 1e3:.1f} |"
        )
    return "\n".join(lines)


def _input_sizes(record: Record) -> dict[str, int]:
    """Of each module, from a record that names candidates: those of the same model are the same."""
    reference = record if record["selection"] else read_record("sst2", ALL, "6", 0)
    assert reference is not None, "the table of bytes needs the run with all modules"
    return {row["module"]: row["in_features"] for row in reference["selection"]["candidates"]}


def _mask(task: str, variant: str, epsilon: str, seed: int) -> Any:
    record = read_record(task, variant, epsilon, seed)
    assert record is not None
    return Selection.from_json(record["selection"]).mask


def _shown(epsilon: str) -> str:
    return epsilon.replace("inf", "∞")


def report() -> str:
    """All tables, each under what it shows."""
    utility = [part for task in TASKS for part in (utility_table(task), difference_table(task))]
    tables = {
        "Metric on public validation data, mean ± standard deviation; the number of seeds where it is not 3. "
        "Differences are paired by seed, each seed's mean over the private ε it has.": "\n\n".join(utility),
        "Overlap of a search's mask with that of the same search without any noise, mean over seeds (chance: "
        "0.5).": stability_table(),
        "The same for the noise of the alignment release alone: scores of runs without noise, to which 200 times that "
        "noise is added.": release_noise_table(),
        "What one site sends in a round of fine-tuning.": uplink_table(),
    }
    return "\n\n".join(f"{title}\n\n{table}" for title, table in tables.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="folder with sst2/, cola/ and mrpc/, each of parquet files")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--epsilons", nargs="+", choices=EPSILONS, default=list(ORDER))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", dest="settings", action="append", default=[], help="section.key=value, as in fedlora")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    chosen = parser.parse_args()
    cells = product(chosen.epsilons, chosen.seeds, chosen.tasks, chosen.variants)
    with TemporaryDirectory() as folder, ThreadPoolExecutor(chosen.workers) as pool:
        settings = [f"data.source={smaller_copy(chosen.source, Path(folder))}", *chosen.settings]
        jobs = [
            pool.submit(run_cell, task, variant, epsilon, seed, settings, chosen.threads)
            for epsilon, seed, task, variant in cells
        ]
        for job in jobs:
            job.result()
    text = report()
    write_between(PAGE, START, END, text)
    print(text)


if __name__ == "__main__":
    main()
