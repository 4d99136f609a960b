"""What filtering noised gradients gains: `python -m simulations.noise_filters --set data.source=PATH_TO_GLUE`.

Runs one short recipe at one ε without a filter, with each filter, and with what shapes the noise itself, over the same
public seeds; keeps each run's record and writes the table of docs/noise_filters.md from the records alone. Noise and
batches are seeded, so that the runs of one seed draw the same ones and their difference is the variant's own. A run
whose record is there is not done again; runs of different code are never compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedlora.experiments.report.statistics import CONFIDENCE, interval, spread, verdict
from simulations.page import write_between
from simulations.recipe_runs import run_recipe

HERE = Path(__file__).parent
RECIPE, RESULTS = HERE / "recipes" / "sst2.toml", HERE / "results" / "noise_filters"
PAGE = HERE.parent / "docs" / "noise_filters.md"
START, END = "<!-- table: python -m simulations.noise_filters -->", "<!-- end of table -->"
COMMON = (
    "privacy.epsilon=1.0",
    "privacy.seeded_noise=true",
    "federation.rounds=6",
    "run.evaluate_every=6",
    "model.dtype=bfloat16",
    "model.attention=eager",
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "doppler-0.5": ("training.noise_filter=doppler", "training.filter_gain=0.5"),
    "doppler-0.3": ("training.noise_filter=doppler", "training.filter_gain=0.3"),
    "disk-0.5": ("training.noise_filter=disk", "training.filter_gain=0.5"),
    "disk-0.3": ("training.noise_filter=disk", "training.filter_gain=0.3"),
    "james_stein": ("training.noise_filter=james_stein",),
    "low_pass-0.5": ("privacy.low_pass=0.5",),
    "gredp-complex": ("privacy.mechanism=gredp", "privacy.gredp_noise=complex"),
}


def record_file(variant: str, seed: int) -> Path:
    return RESULTS / f"{variant}-seed-{seed}.json"


def read_record(variant: str, seed: int) -> dict[str, Any] | None:
    file = record_file(variant, seed)
    return json.loads(file.read_text()) if file.exists() else None


def pairs(variant: str, seeds: Sequence[int]) -> list[tuple[float, float]]:
    """The metric of (variant, none) for each seed that has both, run by the same code: else the noise differs too."""
    found = []
    for seed in seeds:
        own, plain = read_record(variant, seed), read_record("none", seed)
        if own and plain and own["code_digest"] == plain["code_digest"]:
            found.append((float(own["metric"]["value"]), float(plain["metric"]["value"])))
    return found


def table(variants: Sequence[str]) -> str:
    """Markdown: the metric's mean ± standard deviation, and the mean difference to `none` at the same seed."""
    seeds = sorted(int(file.stem.rpartition("-")[2]) for file in RESULTS.glob("none-seed-*.json"))
    lines = [
        f"| variant | seeds | accuracy | paired difference to none | {CONFIDENCE:.0%} interval | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for variant in variants:
        paired = pairs(variant, seeds)
        if not paired:
            continue
        values = [own for own, _ in paired]
        head = f"| {variant} | {len(values)} | {statistics.mean(values):.4f} ± {spread(values):.4f}"
        if variant == "none":
            lines.append(f"{head} | | | |")
            continue
        differences = [own - plain for own, plain in paired]
        shown = f"{statistics.mean(differences):+.4f} ± {spread(differences):.4f}"
        lines.append(f"{head} | {shown} | {interval(differences)} | {verdict(differences)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", dest="settings", action="append", default=[], help="section.key=value, as in fedlora")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    chosen = parser.parse_args()
    with ThreadPoolExecutor(chosen.workers) as pool:
        jobs = [
            pool.submit(
                run_recipe,
                RECIPE,
                record_file(variant, seed),
                [*COMMON, *VARIANTS[variant], f"run.seed={seed}", *chosen.settings],
                chosen.threads,
            )
            for seed in chosen.seeds
            for variant in chosen.variants
        ]
        for job in jobs:
            job.result()
    found = table(list(VARIANTS))
    write_between(PAGE, START, END, found)
    print(found)


if __name__ == "__main__":
    main()
