"""python -m benchmarks.clients: what a round costs as the same samples are shared among more clients.

Every size trains on the same corpus of records with the same expected number of samples in a step, divided among 10,
100 or 1,000 clients: whole rounds through `fedlora.federation.cohort.Cohort.run` with a ledger in memory, the sizes in
turns. Memory is the largest resident set during one round of one step, in a fresh process for each size. Aims: the most
clients take at most 1.2 times the seconds of the fewest, and at most 1 MB each.
"""

from __future__ import annotations

import argparse
import cProfile
import inspect
import json
import pstats
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine, load_average
from benchmarks.memory import CLEAR, peak_during
from benchmarks.report import RESULTS, command, conditions, save, table
from benchmarks.spread import Spread, ratios, take_turns
from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset
from fedlora.engine.expanded import ExpandedBackend
from fedlora.engine.releases import privatize_all
from fedlora.federation.cohort import Cohort
from fedlora.federation.messages import RoundInstruction, check_update
from fedlora.federation.server import initial_state
from fedlora.federation.site import Site
from fedlora.federation.sites import encode_training_data, load_simulated_data, make_sites
from fedlora.federation.workbench import build_workbench
from fedlora.privacy.clipping import Clipping
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.mechanisms.granular import release_on_grid
from fedlora.privacy.noise import HostNoise
from fedlora.privacy.sampling import PoissonSampler
from fedlora.randomness import SecretRoot

SLOWER, BYTES_PER_CLIENT = 1.2, 1_000_000
RECORDS_PER_SAMPLE = 10  # of a step: sampling probability 0.1
# Where a round's time goes. None of these calls another, so that what is left is everything else.
PARTS: dict[str, list[Callable[..., Any]]] = {
    "draws": [PoissonSampler.draw],
    "batches": [EncodedDataset.batch],
    "gradients": [ExpandedBackend.gradients],
    "clip and add up": [Clipping.add_clipped],
    "noise and release": [privatize_all],
    "optimiser": [torch.optim.SGD.step],
    "ledger": [Ledger.reserve, Ledger.settle],
    "sites' admission and facts": [Site.request, Site.admit, Site.facts],
    "checks of what leaves": [check_update],
}


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A federation whose rounds can be done one by one."""

    cohort: Cohort
    set_up: float
    """Seconds until it stood: model, records, plans."""

    def round(self, index: int) -> float:
        """Seconds of one round from the initial theta."""
        bench = self.cohort.workbench
        entry, state = bench.schedule[index], initial_state(bench, "benchmark")
        instruction = RoundInstruction(
            run_id=state.run_id,
            round_index=entry.index,
            phase=entry.phase,
            layout_digest=bench.payload_layout(entry.phase).digest,
            theta=state.theta,
            head=state.head,
        )
        start = time.perf_counter()
        self.cohort.run(instruction)
        return time.perf_counter() - start


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.weigh:
        print(json.dumps(_weigh(options)))
        return
    machine, started = {"command": command("benchmarks.clients")} | describe_machine(), time.perf_counter()
    runs = {clients: _prepare(options, clients, options.repeats + 2, options.steps) for clients in options.clients}
    times = _rounds(runs, options.repeats, random.Random(options.seed))
    most = max(options.clients)
    where = _profile(partial(runs[most].round, options.repeats + 1))
    execution, size = (bench := runs[most].cohort.workbench).execution.describe(), bench.layout.size
    set_up = {clients: round(run.set_up, 2) for clients, run in runs.items()}
    del runs
    memory = {clients: _weighed(options, clients) for clients in options.clients} if CLEAR.exists() else {}
    machine["load_average_after"] = load_average()
    facts: dict[str, Any] = {
        "machine": machine,
        "model": options.model,
        "execution": execution,
        "samples": options.samples,
        "steps": options.steps,
        "sizes": {str(clients): _size(clients, times, memory, set_up) for clients in options.clients},
        "where": {"clients": most, "seconds": where, "one_release": _one_release(size)},
        "bytes_per_client": _bytes_per_client(memory),
        "seconds": round(time.perf_counter() - started),
    }
    facts["missed"] = missed(facts)
    markdown = _markdown(facts)
    print(markdown)
    save(options.out, "clients", facts, markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description="The same samples, more clients.")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--samples", type=int, default=2000, help="expected in a step over all clients")
    parser.add_argument("--steps", type=int, default=5, help="private steps in a round")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--model", default=RunConfig().model.name)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--weigh", type=int, default=0, metavar="CLIENTS", help="only a round's memory, as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    uneven = [clients for clients in chosen.clients if chosen.samples % clients]
    if uneven:
        parser.error(f"--samples {chosen.samples} cannot be divided among {uneven[0]} clients; wanted a multiple")
    return chosen


def _prepare(options: argparse.Namespace, clients: int, rounds: int, steps: int) -> _Run:
    config = RunConfig.from_mapping(
        {
            "model": {"name": options.model, "head": "frozen"},
            "data": {"generated_records": options.samples * RECORDS_PER_SAMPLE},
            "federation": {"clients": clients, "rounds": rounds, "local_steps": steps},
            "training": {"expected_batch_size": options.samples // clients, "learning_rate": 1.0},
            "run": {"device": options.device},
        }
    )
    started = time.perf_counter()
    workbench, data = build_workbench(config), load_simulated_data(config)
    cohort = Cohort(
        workbench=workbench,
        dataset=encode_training_data(workbench, data),
        sites=make_sites(config, data, workbench.schedule),
        ledger=Ledger.in_memory(),
    )
    return _Run(cohort=cohort, set_up=time.perf_counter() - started)


def _rounds(runs: Mapping[int, _Run], repeats: int, order: random.Random) -> dict[int, list[float]]:
    """Seconds of a round, turn by turn, after one round to warm up; each round of a run can be done once."""
    following = {clients: iter(range(repeats + 1)) for clients in runs}
    tasks = {
        str(clients): lambda run=run, next_index=following[clients]: run.round(next(next_index))
        for clients, run in runs.items()
    }
    take_turns(tasks, 1, order)
    times = take_turns(tasks, repeats, order)
    return {clients: times[str(clients)] for clients in runs}


def _profile(task: Callable[[], float]) -> dict[str, float]:
    """Seconds of one round by part. The profiler itself makes what is all Python look a little longer than it is."""
    profile = cProfile.Profile()
    whole = profile.runcall(task)
    profile.create_stats()
    spent: dict[Any, tuple[int, int, float, float, Any]] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    seconds = {name: sum(_cumulative(spent, function) for function in part) for name, part in PARTS.items()}
    return {name: round(value, 6) for name, value in seconds.items()} | {
        "everything else": round(whole - sum(seconds.values()), 6)
    }


def _cumulative(spent: Mapping[Any, tuple[int, int, float, float, Any]], function: Callable[..., Any]) -> float:
    code = inspect.unwrap(function).__code__
    found = spent.get((code.co_filename, code.co_firstlineno, code.co_name))
    return found[3] if found else 0.0


def _one_release(size: int) -> dict[str, float]:
    """Seconds of one client's noise of `size` numbers and of its release; the profiler does not see other threads."""
    source, total = HostNoise(SecretRoot.seeded(0).numpy("noise")), torch.zeros(size, dtype=torch.float64)
    taken: list[tuple[float, float]] = []
    for _ in range(20):
        times = [time.perf_counter()]
        unit_noise = source.standard_normal(size, total.device)
        times.append(time.perf_counter())
        release_on_grid(total, unit_noise, noise_multiplier=1.0, sensitivity=1.0)
        times.append(time.perf_counter())
        taken.append((times[1] - times[0], times[2] - times[1]))
    noise, release = zip(*taken, strict=True)
    return {"noise": Spread.of(noise).median, "release": Spread.of(release).median}


def _weighed(options: argparse.Namespace, clients: int) -> dict[str, int]:
    """`_weigh` in a fresh process."""
    given = ["--samples", options.samples, "--model", options.model, "--device", options.device]
    arguments = [*given, "--threads", options.threads, "--weigh", clients, "--clients", clients]
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.clients", *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        text=True,
    )
    weighed: dict[str, int] = json.loads(answer.stdout)
    return weighed


def _weigh(options: argparse.Namespace) -> dict[str, int]:
    """Bytes that are resident before a round, and the most during it."""
    run = _prepare(options, options.weigh, rounds=1, steps=1)
    before, peak = peak_during(partial(run.round, 0))
    return {"before": before, "peak": peak}


def _size(
    clients: int,
    times: Mapping[int, list[float]],
    memory: Mapping[int, dict[str, int]],
    set_up: Mapping[int, float],
) -> dict[str, Any]:
    slower = ratios(times[clients], times[min(times)])
    return {
        "seconds": Spread.of(times[clients]).to_json(),
        "to_fewest": slower.to_json(),
        "shown": str(slower),
        "set_up_seconds": set_up[clients],
        "memory": memory.get(clients),
    }


def _bytes_per_client(memory: Mapping[int, dict[str, int]]) -> int | None:
    """By how much the peak grows from the fewest to the most clients, for each that is added."""
    if len(memory) < 2:
        return None
    fewest, most = min(memory), max(memory)
    return round((memory[most]["peak"] - memory[fewest]["peak"]) / (most - fewest))


def missed(facts: Mapping[str, Any]) -> list[str]:
    """Every aim that is not met: time by the median ratio of the most clients, memory by its growth."""
    lines = []
    most = str(max(map(int, facts["sizes"])))
    ratio, grown = facts["sizes"][most]["to_fewest"]["median"], facts["bytes_per_client"]
    if ratio > SLOWER:
        lines.append(f"{most} clients take {ratio:.2f} times the seconds of the fewest, wanted at most {SLOWER}")
    if grown is not None and grown > BYTES_PER_CLIENT:
        lines.append(f"a client takes {grown / 1e6:.2f} MB, wanted at most {BYTES_PER_CLIENT / 1e6:g}")
    return lines


def _markdown(facts: dict[str, Any]) -> str:
    where, grown = facts["where"], facts["bytes_per_client"]
    execution = f"{facts['execution']['dtype']} {facts['execution']['attention']} on {facts['execution']['device']}"
    rows: Sequence[Sequence[object]] = [
        [
            clients,
            "{min:.2f} / **{median:.2f}** / {max:.2f}".format(**size["seconds"]),
            size["shown"],
            f"{size['set_up_seconds']:.1f}",
            f"{size['memory']['peak'] / 1e6:.0f} MB" if size["memory"] else "not measured",
        ]
        for clients, size in facts["sizes"].items()
    ]
    total = sum(where["seconds"].values())
    parts = [[name, f"{value:.2f}", f"{value / total:.0%}"] for name, value in where["seconds"].items()]
    return "\n\n".join(
        [
            "# The same samples, more clients",
            conditions(facts["machine"]),
            f"{facts['model']}, {execution}. A round is {facts['steps']} private steps; a step has "
            f"{facts['samples']} samples expected over all clients, of ten times as many records of the generated "
            "SST-2-like corpus. Smallest / **median** / largest; memory is the largest resident set during a round of "
            "one step, in a fresh process.",
            table(["clients", "seconds a round", "to the fewest", "set-up, s", "peak memory"], rows),
            f"A client more takes {grown / 1e6:.2f} MB." if grown is not None else "Memory was not measured.",
            f"## Where a round of {where['clients']} clients goes",
            table(["", "seconds", "share"], parts),
            "One round under cProfile: seconds of the host; what is all Python looks a little longer than it is. "
            f"In one thread a client's noise takes {1e3 * where['one_release']['noise']:.2f} ms a step and its release "
            f"on the grid {1e3 * where['one_release']['release']:.2f} ms.",
            "## Aims missed",
            "\n".join(f"* {line}" for line in facts["missed"]) or "none",
        ]
    )


if __name__ == "__main__":
    main()
