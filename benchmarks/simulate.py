"""python -m benchmarks.simulate: one federated job, from typing the command to its end, five ways.

cohort                      fedlora simulate: all clients fused in one process
cohort, float32             the same with the base in float32 sdpa, as the example has it: what is left without bfloat16
flower                      fedlora simulate --transport flower: the clients shared by workers of Flower's engine
example, model cached       Flower's engine with Opacus and PEFT, as one would write it from Flower's examples; the
                            model kept in every actor (benchmarks/flower_example)
example, model per message  the same as the examples have it: the model read for every message

Same records, partition, weights, clients, rounds, steps, expected batch, clipping, noise, and one evaluation a round;
the example in float32 sdpa, padded to the longest text of a batch. Aims: cohort at least 3 times as fast as the example
with a cached model and 10 times as fast as with one per message, start-up included.

With --example-rounds N the example is run for 1 and for N rounds, and the rest is extrapolated: a straight line.
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
COHORT, FLOAT32, FLOWER = "cohort", "cohort, float32", "flower"
CACHED, ANEW = "example, model cached", "example, model per message"
AIMS = {CACHED: 3.0, ANEW: 10.0}


def main() -> None:
    options = _options()
    if options.cpus < (os.cpu_count() or 1):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cpus :])  # every process below inherits it
    machine, started = {"command": command("benchmarks.simulate")} | describe_machine(), time.perf_counter()
    config = _job(options)
    with tempfile.TemporaryDirectory(prefix="fedlora-benchmark-") as scratch:
        runner = _Runner(config, options, Path(scratch))
        first = runner.cohort("")  # alone, since it also measures kernels and calibrates noise for those that follow
        print(f"first run on a machine: {first.seconds:.1f} s")
        outcomes = take_turns(runner.tasks(options.without), options.repeats, random.Random(options.seed))
    machine["load_average_after"] = load_average()
    ways = {name: _facts(found, outcomes[COHORT], name) for name, found in outcomes.items()}
    facts: dict[str, Any] = {
        "machine": machine | {"threads": options.cpus},
        "job": config.to_mapping(),
        "first_run_seconds": round(first.seconds, 2),
        "example_rounds": options.example_rounds,
        "ways": ways,
        "missed": [name for name, way in ways.items() if way["times_cohort"]["median"] < AIMS.get(name, 0.0)],
        "seconds": round(time.perf_counter() - started),
    }
    markdown = _markdown(config, facts)
    print(markdown)
    save(options.out, "simulate", facts, markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description="One federated job, five ways.")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2, help="private steps of a client in a round: its records once")
    parser.add_argument("--batch", type=int, default=16, help="expected batch; an empty one fails the example")
    parser.add_argument(
        "--example-rounds", type=int, default=0, help="extrapolate the example from 1 and so many; 0: no"
    )
    parser.add_argument("--model", default=RunConfig().model.name)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="cores that each way may use")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="ways to leave out, by first letters")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which a single run has failed")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if chosen.example_rounds and not 1 < chosen.example_rounds < chosen.rounds:
        parser.error(f"--example-rounds {chosen.example_rounds}, wanted 2 to {chosen.rounds - 1}, or 0 for all of them")
    return chosen


def _job(options: argparse.Namespace) -> RunConfig:
    """The local steps are one epoch, as in Flower's example; the frozen head makes fine-tuning the only phase."""
    records = options.clients * options.batch * options.steps
    return RunConfig.from_mapping(
        {
            "model": {"name": options.model, "head": "frozen"},
            "data": {"generated_records": records},
            "federation": {"clients": options.clients, "rounds": options.rounds, "local_steps": options.steps},
            "training": {"expected_batch_size": options.batch, "schedule": "constant", "learning_rate": 1.0},
            "run": {"device": "cpu"},
        }
    )


class _Runner:
    """Starts each way in a process of its own, with an empty folder and the same CPUs.

    Threads are left to torch and to Ray, which gives an actor as many as CPUs; OMP_NUM_THREADS would reach the actors.
    """

    def __init__(self, config: RunConfig, options: argparse.Namespace, scratch: Path) -> None:
        self.config, self.scratch = config, scratch
        self.cpus, self.limit, self.example_rounds = options.cpus, options.limit, options.example_rounds
        self.recipe, self.settings = scratch / "recipe.toml", scratch / "settings.json"
        self.recipe.write_text(config.to_toml(), encoding="utf-8")
        self.runs = 0

    def tasks(self, without: list[str]) -> dict[str, Callable[[], Outcome]]:
        float32 = ["--set", "model.dtype=float32", "--set", "model.attention=sdpa"]
        one_node_each = f"run.workers={self.config.federation.clients}"  # Flower's ordinary way
        every: dict[str, Callable[[], Outcome]] = {
            COHORT: functools.partial(self.cohort, COHORT),
            FLOAT32: functools.partial(self.cohort, FLOAT32, *float32),
            FLOWER: functools.partial(self.cohort, FLOWER, "--transport", "flower", "--set", one_node_each),
            CACHED: functools.partial(self.example, CACHED, "cached"),
            ANEW: functools.partial(self.example, ANEW, "per message"),
        }
        return {name: task for name, task in every.items() if name == COHORT or not name.startswith(tuple(without))}

    def cohort(self, name: str, *arguments: str) -> Outcome:
        """`fedlora simulate`; every run after the first finds what that one remembered."""
        folder = self._folder()
        return self._run(name, [*FEDLORA, str(self.recipe), "--out", str(folder / "run"), *arguments], folder)

    def example(self, name: str, model: str) -> Outcome:
        """The example with its model `model`, extrapolated to all rounds where only some are to be run."""
        rounds = self.config.federation.rounds
        if not self.example_rounds:
            return self._example(name, model, rounds)
        first, some = (self._example(name, model, count) for count in (1, self.example_rounds))
        return extrapolated(first, some, self.example_rounds, rounds)

    def _example(self, name: str, model: str, rounds: int) -> Outcome:
        folder = self._folder()
        self.settings.write_text(json.dumps(self._example_settings(model, rounds)), encoding="utf-8")
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

    def _example_settings(self, model: str, rounds: int) -> Mapping[str, Any]:
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
            "rounds": rounds,
            "generated-records": config.data.generated_records,
            "batch-size": batch,
            "model": model,
            "learning-rate": config.training.learning_rate,
            "noise-multiplier": plan[FINETUNE].mechanism.noise_multiplier,
            "max-grad-norm": config.privacy.clip_norm,
            "target-delta": config.privacy.delta,
            "cpus": self.cpus,
        }


def extrapolated(first: Outcome, some: Outcome, measured: int, rounds: int) -> Outcome:
    """What `rounds` rounds would take, by one round, start-up included, and by `measured` of them."""
    each = (some.seconds - first.seconds) / (measured - 1)
    return Outcome(first.seconds + (rounds - 1) * each, max(first.peak_bytes, some.peak_bytes), some.output)


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
    federation, training, some = config.federation, config.training, facts["example_rounds"]
    each = config.data.generated_records // federation.clients
    rows = [
        [
            f"{name} (extrapolated from 1 and {some} rounds)" if some and name in AIMS else name,
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
            f"{config.model.name}, LoRA r = 8 on query and value with A frozen, "
            f"ε = {config.privacy.epsilon:g}. Wall clock from command to end, smallest / **median** / largest; memory "
            "is the largest sum of proportional set sizes over the tree of processes. The very first run on a machine, "
            f"which measures kernels and calibrates noise, took {facts['first_run_seconds']:.1f} s; "
            "later ones find both in the cache. What the example does for every message is what Flower's own examples "
            "do, the ε of that message from Opacus' accountant included.",
            table(["", "seconds", "times as long as cohort", "aim", "peak memory"], rows),
            f"Aims missed by the median: {', '.join(facts['missed']) or 'none'}",
        ]
    )


if __name__ == "__main__":
    main()
