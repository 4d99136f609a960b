"""python -m benchmarks.accounting: what a long run spends on knowing what it spends, beside its training.

Sites of different size, so that none shares q or σ with another, do all rounds of a run as far as its price goes:
noise is calibrated, each round is asked for, granted by a ledger, priced for the public facts and settled. That part is
measured whole, in a fresh process for each ledger, from an empty cache of calibrations on. Training of a few rounds of
the same run is measured in a process of its own and scaled to all rounds; evaluation is left out, which would only make
the share smaller. Aim: below 1 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe_machine, load_average
from benchmarks.report import RESULTS, command, conditions, save, table
from benchmarks.spread import Spread
from fedlora.config import RunConfig
from fedlora.federation.messages import RoundInstruction
from fedlora.federation.schedule import make_schedule
from fedlora.federation.shelf import Shelf
from fedlora.federation.site import Site
from fedlora.federation.sites import TrainingData, make_sites
from fedlora.privacy.ledger import Cap, Ledger

AIM = 0.01
IN_MEMORY, ON_DISK, ROOMY, TIGHT = "in memory, no cap", "on disk, no cap", "on disk, cap × 10", "on disk, cap × 1.001"
WAYS = {IN_MEMORY: 0.0, ON_DISK: 0.0, ROOMY: 10.0, TIGHT: 1.001}
"""Ledgers, and their cap over what the run costs; 0: none."""
SMALLEST, LARGEST = 5, 20
"""Records of the smallest and the largest site, in expected batches."""


def main() -> None:
    options = _options()
    if options.measure:
        print(json.dumps(_account(options) if options.measure in WAYS else _train(options)))
        return
    machine, started = {"command": command("benchmarks.accounting")} | describe_machine(), time.perf_counter()
    spent = {way: _measured(options, way) for way in options.ways}
    trained = _measured(options, "training")
    machine["load_average_after"] = load_average()
    training = trained["round_seconds"]["median"] * options.rounds
    shares = {way: one["seconds"] / (one["seconds"] + training) for way, one in spent.items()}
    facts = {
        "machine": machine | {"threads": trained["threads"]},
        "clients": options.clients, "rounds": options.rounds, "local_steps": options.local_steps,
        "expected_batch_size": options.batch, "model": options.model,
        "training": trained | {"scaled_seconds": round(training, 1)},
        "ways": {way: one | {"share": round(shares[way], 5)} for way, one in spent.items()},
        "missed": [way for way, share in shares.items() if share >= AIM],
        "seconds": round(time.perf_counter() - started),
    }  # fmt: skip
    markdown = _markdown(facts)
    print(markdown)
    save(options.out, "accounting", facts, markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accounting", description="Accounting beside training.")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--local-steps", type=int, default=RunConfig().federation.local_steps)
    parser.add_argument("--batch", type=int, default=RunConfig().training.expected_batch_size, help="expected batch")
    parser.add_argument("--trained-rounds", type=int, default=3, help="rounds whose training is measured")
    parser.add_argument("--model", default=RunConfig().model.name)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ledgers to measure")
    parser.add_argument("--measure", help="(internal) what to measure in this process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _measured(options: argparse.Namespace, what: str) -> dict[str, Any]:
    """What a fresh process finds. Those that account have an empty cache; the one that trains has this user's."""
    asked = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in _PASSED_ON]
    with tempfile.TemporaryDirectory(prefix="fedlora-benchmark-") as empty:
        cache = {} if what == "training" else {"FEDLORA_CACHE": empty}
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.accounting", *asked, "--measure", what],
            check=True, stdout=subprocess.PIPE, text=True, env=os.environ | cache,
        )  # fmt: skip
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    print(what, found, flush=True)
    return found


_PASSED_ON = ("clients", "rounds", "local-steps", "batch", "trained-rounds", "model")


def _config(options: argparse.Namespace) -> tuple[RunConfig, TrainingData]:
    """The quickstart with more clients and rounds, and its records in parts of sizes that are all different."""
    sizes = np.linspace(SMALLEST * options.batch, LARGEST * options.batch, options.clients).astype(int).tolist()
    config = RunConfig.from_mapping(
        {
            "model": {"name": options.model},
            "data": {"generated_records": sum(sizes)},
            "federation": {
                "clients": options.clients,
                "rounds": options.rounds,
                "local_steps": options.local_steps,
            },
            "training": {"expected_batch_size": options.batch},
        }
    )
    records = Shelf().records(config, "train")
    ends = pairwise(accumulate(sizes, initial=0))
    return config, TrainingData(records=records, parts={i: np.arange(*part) for i, part in enumerate(ends)})


@dataclass
class _Clock:
    """Seconds by what they went to."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def _account(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of a run as `Cohort.run` pays for them, without what is paid for."""
    config, data = _config(options)
    clock = _Clock()
    with clock.on("calibration"):  # with dp-accounting's import
        sites = make_sites(config, data, make_schedule(config))
    factor = WAYS[options.measure]
    for site in sites:
        site.cap = Cap(epsilon=factor * site.plan.epsilon(), delta=site.plan.delta) if factor else None
    with tempfile.TemporaryDirectory(prefix="fedlora-benchmark-") as folder:
        path = Path(folder) / "ledger.sqlite"
        with closing(Ledger.in_memory() if options.measure == IN_MEMORY else Ledger.open(path)) as ledger:
            _pay(sites, ledger, clock)
    seconds = sum(clock.seconds.values())
    return {"seconds": round(seconds, 2), "parts": {name: round(value, 2) for name, value in clock.seconds.items()}}


def _pay(sites: list[Site], ledger: Ledger, clock: _Clock) -> None:
    for entry in sites[0].schedule:  # everyone takes part in every round
        instruction = RoundInstruction(
            run_id="run", round_index=entry.index, phase=entry.phase, layout_digest="", theta=torch.zeros(1)
        )
        with clock.on("requests"):
            requests = [site.request(instruction) for site in sites]
        with clock.on("ledger"):
            reservations = ledger.reserve(requests)
        with clock.on("ε for the facts"):
            for site in sites:
                site.facts(site.admit(instruction))
        with clock.on("settling"):
            ledger.settle(reservations)


def _train(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of `Cohort.run` per round of training, as `fedlora simulate` does it on this machine."""
    from fedlora.experiments.simulate import resolve
    from fedlora.federation.cohort import Cohort
    from fedlora.federation.workbench import build_workbench
    from fedlora.privacy.phases import FINETUNE

    options.rounds = options.trained_rounds + 1  # the first warms up; what a round costs is that of any number
    config, data = _config(options)
    shelf = Shelf()
    bench = build_workbench(resolve(config), shelf)
    cohort = Cohort(
        workbench=bench,
        dataset=shelf.encoded(config, "train", bench.classifier),
        sites=make_sites(config, data, make_schedule(config)),
        ledger=Ledger.in_memory(),
    )
    seconds = []
    for entry in bench.schedule:
        if entry.phase != FINETUNE:
            continue
        instruction = RoundInstruction(
            run_id="run", round_index=entry.index, phase=entry.phase,
            layout_digest=bench.payload_layout(entry.phase).digest, theta=torch.zeros(bench.layout.size),
        )  # fmt: skip
        started = time.perf_counter()
        cohort.run(instruction)
        seconds.append(time.perf_counter() - started)
    execution = bench.execution.describe()
    return {
        "round_seconds": Spread.of(seconds[1:]).to_json(),
        "rounds": options.trained_rounds,
        "threads": torch.get_num_threads(),
        "execution": execution,
    }


def _markdown(facts: dict[str, Any]) -> str:
    rows = [
        [
            way,
            *(f"{seconds:.2f}" for seconds in one["parts"].values()),
            f"{one['seconds']:.1f}",
            f"**{one['share']:.2%}**",
        ]
        for way, one in facts["ways"].items()
    ]
    training = facts["training"]
    return "\n\n".join(
        [
            "# Accounting",
            conditions(facts["machine"]),
            f"{facts['clients']} sites of {SMALLEST} to {LARGEST} expected batches, all different; {facts['rounds']:,} "
            f"rounds of {facts['local_steps']} steps with expected batch {facts['expected_batch_size']}; "
            f"{facts['model']}, generated corpus. Seconds of the whole run, in a fresh process with no calibration "
            "remembered. *ledger* and *settling* contain the disk's two fsyncs a round where the ledger lies on disk. "
            "cap × 1.001: the cap is a thousandth above what the run costs, so that only the exact ε shows that it "
            f"holds. A round of training took {training['round_seconds']['median']:.2f} s (median of "
            f"{training['rounds']}), scaled to {training['scaled_seconds']:,.0f} s for all; evaluation not counted.",
            table(["ledger", *next(iter(facts["ways"].values()))["parts"], "accounting", "share of the run"], rows),
            f"Aim: below {AIM:.0%}. Missed: {'; '.join(facts['missed']) or 'none'}",
        ]
    )


if __name__ == "__main__":
    main()
