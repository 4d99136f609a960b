"""python -m benchmarks.startup: seconds from typing a command to what it was typed for, in fresh processes.

The commands that answer at once are run to their end. `fedlora simulate`, as the quickstart has it, is run to the end
of its first private step of training and no further; its way there is told apart by stage. A machine's first start is
measured once, with none of what fedlora remembers; all that follow find it. Aims: `--help` below 0.3 s, `budget` and
`calibrate` below 0.5 s, the first step below 8 s on four cores.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.machine import describe_machine, load_average
from benchmarks.report import RESULTS, command, conditions, save, table
from benchmarks.spread import Spread, take_turns
from fedlora.privacy.accounting import Charge
from fedlora.privacy.ledger import Cap, DataSet, Ledger, Request

CHECKOUT = Path(__file__).parent.parent
STARTED, MARKS = "FEDLORA_BENCHMARK_STARTED", "FEDLORA_BENCHMARK_MARKS"
HELP, CALIBRATE, BUDGET, FIRST_STEP = "--help", "calibrate", "budget", "first step"
AIMS = {HELP: 0.3, CALIBRATE: 0.5, BUDGET: 0.5, FIRST_STEP: 8.0}
LIMIT = 600.0

STAGES = {
    "records": ("fedlora.experiments.simulate", "load_simulated_data"),
    "plans": ("fedlora.experiments.simulate", "make_sites"),
    "choice of execution": ("fedlora.experiments.simulate", "resolve"),
    "model and adapters": ("fedlora.experiments.simulate", "build_workbench"),
    "evaluation data": ("fedlora.experiments.simulate", "Evaluator"),
    "prototype sums": ("fedlora.federation.cohort", "class_sums"),
}
"""What is called on the way, by the name under which the caller knows it; seconds of all calls together."""
IMPORTS, REST, STEP = "imports", "rest", "step"


def main() -> None:
    if MARKS in os.environ:
        _start_training(float(os.environ[STARTED]), Path(os.environ[MARKS]))
    options = _options()
    if options.cpus < (os.cpu_count() or 1):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cpus :])  # every process below inherits it
    machine, started = {"command": command("benchmarks.startup")} | describe_machine(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedlora-benchmark-") as scratch:
        starter = _Starter(Path(scratch), options.overrides)
        first = {name: task() for name, task in starter.tasks().items()}
        found = take_turns(starter.tasks(), options.repeats, random.Random(options.seed))
    machine["load_average_after"] = load_average()
    ways = {name: _facts(runs, first[name], AIMS[name]) for name, runs in found.items()}
    facts: dict[str, Any] = {
        "machine": machine | {"threads": options.cpus},
        "overrides": options.overrides,
        "ways": ways,
        "missed": [name for name, way in ways.items() if way["seconds"]["median"] >= way["aim"]],
        "seconds": round(time.perf_counter() - started),
    }
    markdown = _markdown(facts)
    print(markdown)
    save(options.out, "startup", facts, markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description="From a command to its answer.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="cores that each process may use")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="of the quickstart, repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


class _Starter:
    """Runs each command in a process of its own; what one remembers on disk, the next ones find."""

    def __init__(self, scratch: Path, overrides: list[str]) -> None:
        self.scratch, self.overrides, self.runs = scratch, overrides, 0
        self.ledger = scratch / "ledger.sqlite"
        _write_ledger(self.ledger)

    def tasks(self) -> dict[str, Callable[[], dict[str, float]]]:
        """Seconds of a run by stage."""
        return {
            HELP: functools.partial(self._whole, "--help"),
            CALIBRATE: functools.partial(self._whole, "calibrate", "--records", "1000"),
            BUDGET: functools.partial(self._whole, "budget", str(self.ledger)),
            FIRST_STEP: self._first_step,
        }

    def _whole(self, *arguments: str) -> dict[str, float]:
        started = time.perf_counter()
        self._run([sys.executable, "-m", "fedlora", *arguments], {})
        return {"all": time.perf_counter() - started}

    def _first_step(self) -> dict[str, float]:
        self.runs += 1
        marks, out = self.scratch / f"{self.runs}.json", self.scratch / str(self.runs)
        overrides = [part for override in self.overrides for part in ("--set", override)]
        arguments = [sys.executable, "-m", "benchmarks.startup", "simulate", "--out", str(out), *overrides]
        self._run(arguments, {MARKS: str(marks), STARTED: str(time.time())})
        found: dict[str, float] = json.loads(marks.read_text(encoding="utf-8"))
        return found

    def _run(self, arguments: list[str], more: Mapping[str, str]) -> None:
        """Threads are left to torch, as they are to one who types the command."""
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment |= {"FEDLORA_CACHE": str(self.scratch / "cache"), "HF_HUB_OFFLINE": "1", **more}
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=CHECKOUT, timeout=LIMIT)


def _write_ledger(path: Path) -> None:
    """That of a site which took part in one run of the quickstart's kind."""
    owner, cap = DataSet(fingerprint="f" * 64, name="ward"), Cap(epsilon=8.0, delta=1e-5)
    with closing(Ledger.open(path)) as ledger:
        for number in range(11):
            phase, charge = ("finetune", Charge(0.1, 2.5, 10)) if number else ("prototype", Charge(1.0, 20.0, 1))
            request = Request(
                data_set=owner, charge=charge, run="run", round_index=number, purpose=phase, cap=cap
            )  # fmt: skip
            ledger.settle(ledger.reserve([request]))


def _start_training(started: float, marks: Path) -> NoReturn:
    """`fedlora` with the arguments at hand, in this process, until one step of training is done."""
    import fedlora.cli

    seconds = {IMPORTS: 0.0}
    for stage, (module, name) in STAGES.items():
        owner = importlib.import_module(module)
        setattr(owner, name, _timed(getattr(owner, name), stage, seconds))
    seconds[IMPORTS] = time.time() - started  # with Python's own start
    cohort: Any = importlib.import_module("fedlora.federation.cohort")
    train = cohort.train

    def first_step(*arguments: Any, **settings: Any) -> NoReturn:
        reached = time.time() - started
        _timed(train, STEP, seconds)(*arguments, **settings | {"num_steps": 1})
        seconds["all"] = time.time() - started
        seconds[REST] = reached - sum(value for stage, value in seconds.items() if stage not in (STEP, "all"))
        marks.write_text(json.dumps(seconds), encoding="utf-8")
        os._exit(0)  # no more rounds, no run folder to finish

    cohort.train = first_step
    fedlora.cli.main()


def _timed(task: Callable[..., Any], stage: str, seconds: dict[str, float]) -> Callable[..., Any]:
    seconds[stage] = 0.0

    def run(*arguments: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        try:
            return task(*arguments, **settings)
        finally:
            seconds[stage] += time.perf_counter() - started

    return run


def _facts(runs: list[dict[str, float]], first: dict[str, float], aim: float) -> dict[str, Any]:
    return {
        "seconds": Spread.of(run["all"] for run in runs).to_json(),
        "first_seconds": round(first["all"], 4),
        "aim": aim,
        "stages": {
            stage: Spread.of(run[stage] for run in runs).to_json() | {"first": round(first[stage], 4)}
            for stage in first
            if stage != "all"
        },
    }


def _markdown(facts: dict[str, Any]) -> str:
    rows = [
        [
            f"`fedlora {name}`" if name != FIRST_STEP else "`fedlora simulate` to the end of its first step",
            _shown(way["seconds"]),
            f"{way['first_seconds']:.2f}",
            f"< {way['aim']:g}",
        ]
        for name, way in facts["ways"].items()
    ]
    stages = facts["ways"][FIRST_STEP]["stages"]
    order = [IMPORTS, *STAGES, REST, STEP]
    return "\n\n".join(
        [
            "# Start-up",
            conditions(facts["machine"]),
            "Seconds from the start of the process, smallest / **median** / largest. *first*: with none of what "
            "fedlora remembers on disk; the files themselves may be in the system's cache. `budget` reads and "
            "verifies a ledger of eleven rounds and finds its prices, `calibrate` and the plans of a run their noise "
            "multiplier, and a run the fastest execution, among what is remembered.",
            table(["", "seconds", "first", "aim"], rows),
            "On the way to the first step. *rest*: encoding, the first round's price and charge, evaluation after it, "
            "and everything else.",
            table(["stage", "seconds", "first"], [[s, _shown(stages[s]), f"{stages[s]['first']:.2f}"] for s in order]),
            f"Aims missed by the median: {', '.join(facts['missed']) or 'none'}",
        ]
    )


def _shown(spread: Mapping[str, float]) -> str:
    return "{min:.2f} / **{median:.2f}** / {max:.2f}".format(**spread)


if __name__ == "__main__":
    main()
