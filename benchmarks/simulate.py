"""python -m benchmarks.simulate: one federated job, from typing the command to its end, four ways.

cohort             fedlora simulate: all clients fused in one process
cohort, float32    the same with the base in float32 sdpa, as the example has it: what is left without bfloat16
flower             fedlora simulate --transport flower: Flower's engine, the model cached in every actor
example            Flower's engine with a client as Flower's examples have it: see benchmarks/flower_example

Same records, partition, weights, clients, rounds, steps, expected batch, clipping, noise, and one evaluation a round.
Aims: cohort at least 5 times as fast as the example and twice as fast as flower.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.flower_example import OFFLINE
from benchmarks.machine import describe_machine, load_average
from benchmarks.process_tree import Outcome, run
from benchmarks.report import RESULTS, command, conditions, save, table
from benchmarks.spread import Spread, ratios, take_turns
from fedlora.config import RunConfig
from fedlora.models.source import locate_model
from fedlora.privacy.phases import FINETUNE
from fedlora.privacy.plan import make_plan

CHECKOUT = Path(__file__).parent.parent
FEDLORA = [sys.executable, "-m", "fedlora", "simulate"]
COHORT, FLOAT32, FLOWER = "cohort", "cohort, float32", "flower, model cached"
EXAMPLE, FIXED = "example, padded to the longest", "example, padded to 128"
AIMS = {EXAMPLE: 5.0, FIXED: 5.0, FLOWER: 2.0}


def main() -> None:
    options = _options()
    if options.cpus < (os.cpu_count() or 1):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cpus :])  # every process below inherits it
    machine, started = {"command": command("benchmarks.simulate")} | describe_machine(), time.perf_counter()
    config = _job(options)
    with tempfile.TemporaryDirectory(prefix="fedlora-benchmark-") as scratch:
        runner = _Runner(config, options.cpus, Path(scratch), options.limit)
        first = runner.cohort("")  # alone, since it also measures kernels and calibrates noise for those that follow
        print(f"first run on a machine: {first.seconds:.1f} s")
        outcomes = take_turns(runner.tasks(options.without), options.repeats, random.Random(options.seed))
    machine["load_average_after"] = load_average()
    ways = {name: _facts(found, outcomes[COHORT], name) for name, found in outcomes.items()}
    facts: dict[str, Any] = {
        "machine": machine | {"threads": options.cpus},
        "job": config.to_mapping(),
        "first_run_seconds": round(first.seconds, 2),
        "ways": ways,
        "missed": [name for name, way in ways.items() if way["times_cohort"]["median"] < AIMS.get(name, 0.0)],
        "seconds": round(time.perf_counter() - started),
    }
    markdown = _markdown(config, facts)
    print(markdown)
    save(options.out, "simulate", facts, markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description="One federated job, four ways.")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32, help="expected batch; a client has ten times as many records")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="cores that each way may use")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="ways to leave out, by first letters")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which a single run has failed")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _job(options: argparse.Namespace) -> RunConfig:
    """Ten local steps are one epoch, as in Flower's example; the frozen head makes fine-tuning the only phase."""
    records = options.clients * options.batch * 10
    return RunConfig.from_mapping(
        {
            "model": {"head": "frozen"},
            "data": {"generated_records": records},
            "federation": {"clients": options.clients, "rounds": options.rounds, "local_steps": 10},
            "training": {"expected_batch_size": options.batch, "schedule": "constant", "learning_rate": 1.0},
            "run": {"device": "cpu"},
        }
    )


class _Runner:
    """Starts each way in a process of its own, with an empty folder and the same CPUs.

    Threads are left to torch and to Ray, which gives an actor as many as CPUs; OMP_NUM_THREADS would reach the actors.
    """

    def __init__(self, config: RunConfig, cpus: int, scratch: Path, limit: float) -> None:
        self.config, self.cpus, self.scratch, self.limit = config, cpus, scratch, limit
        self.recipe, self.settings = scratch / "recipe.toml", scratch / "settings.json"
        self.recipe.write_text(config.to_toml(), encoding="utf-8")
        self.runs = 0

    def tasks(self, without: list[str]) -> dict[str, Callable[[], Outcome]]:
        float32 = ["--set", "model.dtype=float32", "--set", "model.attention=sdpa"]
        every: dict[str, Callable[[], Outcome]] = {
            COHORT: functools.partial(self.cohort, COHORT),
            FLOAT32: functools.partial(self.cohort, FLOAT32, *float32),
            FLOWER: functools.partial(self.cohort, FLOWER, "--transport", "flower"),
            EXAMPLE: functools.partial(self.example, EXAMPLE, "longest"),
            FIXED: functools.partial(self.example, FIXED, "max_length"),
        }
        return {name: task for name, task in every.items() if name == COHORT or not name.startswith(tuple(without))}

    def cohort(self, name: str, *arguments: str) -> Outcome:
        """`fedlora simulate`; every run after the first finds what that one remembered."""
        folder = self._folder()
        return self._run(name, [*FEDLORA, str(self.recipe), "--out", str(folder / "run"), *arguments], folder)

    def example(self, name: str, padding: str) -> Outcome:
        folder = self._folder()
        self.settings.write_text(json.dumps(self._example_settings(padding)), encoding="utf-8")
        return self._run(name, [sys.executable, "-m", "benchmarks.flower_example", str(self.settings)], folder)

    def _run(self, name: str, command: list[str], folder: Path) -> Outcome:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | OFFLINE
        environment |= {"FEDLORA_CACHE": str(self.scratch / "cache"), "PYTHONPATH": str(CHECKOUT)}
        outcome = run(command, cwd=folder, environment=environment, limit=self.limit)
        print(f"{name or 'warm-up'}: {outcome.seconds:.1f} s, {outcome.peak_bytes / 1e9:.2f} GB", flush=True)
        return outcome

    def _folder(self) -> Path:
        self.runs += 1
        folder = self.scratch / str(self.runs)
        folder.mkdir()
        return folder

    def _example_settings(self, padding: str) -> Mapping[str, Any]:
        config = self.config
        batch, clients = config.training.expected_batch_size, config.federation.clients
        plan = make_plan(
            config,
            num_examples=config.data.generated_records // clients,
            num_steps={FINETUNE: config.federation.rounds * config.federation.local_steps},
            client=0,
        )
        return {
            "model-folder": str(locate_model(config.model.name).folder),
            "rank": config.adapter.rank,
            "alpha": config.adapter.alpha,
            "clients": clients,
            "rounds": config.federation.rounds,
            "generated-records": config.data.generated_records,
            "batch-size": batch,
            "padding": padding,
            "learning-rate": config.training.learning_rate,
            "noise-multiplier": plan[FINETUNE].mechanism.noise_multiplier,
            "max-grad-norm": config.privacy.clip_norm,
            "target-delta": config.privacy.delta,
            "cpus": self.cpus,
        }


def _facts(outcomes: list[Outcome], cohort: list[Outcome], name: str) -> dict[str, Any]:
    seconds = [outcome.seconds for outcome in outcomes]
    slower = ratios(seconds, [outcome.seconds for outcome in cohort])
    return {
        "seconds": Spread.of(seconds).to_json(),
        "times_cohort": slower.to_json(),
        "shown": str(slower),
        "aim": AIMS.get(name),
        "peak_bytes": max(outcome.peak_bytes for outcome in outcomes),
    }


def _markdown(config: RunConfig, facts: dict[str, Any]) -> str:
    federation, training = config.federation, config.training
    each = config.data.generated_records // federation.clients
    rows = [
        [
            name,
            "{min:.1f} / **{median:.1f}** / {max:.1f}".format(**way["seconds"]),
            way["shown"],
            f">= {way['aim']:g}" if way["aim"] else "",
            f"{way['peak_bytes'] / 1e9:.2f} GB",
        ]
        for name, way in facts["ways"].items()
    ]
    return "\n\n".join(
        [
            "# One federated job",
            conditions(facts["machine"]),
            f"{federation.clients} clients with {each} records of the generated SST-2-like corpus, {federation.rounds} "
            f"rounds of {federation.local_steps} private steps, expected batch {training.expected_batch_size}, "
            "MiniLM-L6, LoRA r = 8 on query and value with A frozen, "
            f"ε = {config.privacy.epsilon:g}. Wall clock from command to end, smallest / **median** / largest; memory "
            "is the largest sum of proportional set sizes over the tree of processes. The very first run on a machine, "
            f"which measures kernels and calibrates noise, took {facts['first_run_seconds']:.1f} s; "
            "later ones find both in the cache.",
            table(["", "seconds", "times as long as cohort", "aim", "peak memory"], rows),
            f"Aims missed by the median: {', '.join(facts['missed']) or 'none'}",
        ]
    )


if __name__ == "__main__":
    main()
