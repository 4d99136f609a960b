"""python -m benchmarks.deployed_load: fifty sites and one server on one machine, twenty rounds; does its memory grow?

SuperLink (TLS, SuperNode authentication, database), ServerApp and one SuperNode for each site are real processes, and
so is each site's courier. The sites' daemons are one process with as many sockets that answers with valid updates of
noise (benchmarks/deployed/stand_in.py): under load is the server, and no site computes. After every round the resident
memory of ServerApp and SuperLink is read, and the size of the SuperLink's database.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from benchmarks.deployed.sites import copy_checkout
from benchmarks.machine import describe_machine, load_average
from benchmarks.report import RESULTS, command, conditions, save, table
from benchmarks.spread import Spread
from deploy.loopback import SERVING, Loopback
from deploy.services import Service
from fedlora.config import RunConfig
from fedlora.errors import FedloraError
from fedlora.experiments.run_folder import RunFolder

AT_ONCE = 5
"""SuperNodes that are started together: each takes two seconds of a core."""
LIMIT = 3600.0
ASK, LOOK = 30.0, 0.1
MB = 1e6
LEAST_FREE = 1e9
"""Bytes of the machine's memory; with fewer left everything is ended."""
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1"}
"""With fifty SuperNodes on one machine, looking for tasks ten times a second, as one on its own does, takes cores."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes after a round."""

    server_app: int
    superlink: int
    database: int
    free: int
    """Of the machine's memory, while the round was at work: the least that was seen."""


def run_load(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Start everything, do one run, and tell what was seen."""
    clients, checkout = config.federation.clients, copy_checkout(folder / "checkout")
    with ExitStack() as stack:
        federation = stack.enter_context(Loopback(folder / "federation", sites=clients, environment=QUIET))
        sockets = _start_stand_ins(federation, config, folder, checkout)
        federation.start_superlink()
        started = time.monotonic()
        for first in range(0, clients, AT_ONCE):
            some = range(first, min(first + AT_ONCE, clients))
            federation.start_supernodes([f'partition-id={client} site="{sockets}/{client}.sock"' for client in some])
        print(f"{clients} SuperNodes in {time.monotonic() - started:.0f} s, load {load_average()[0]}", flush=True)
        fleet = sum(_resident(process) for node in federation.supernodes for process in node.processes())
        out = folder / "run"
        run = federation.submit({**config.to_flower(), "run.out": str(out)}, app=checkout)
        sizes = _watch(federation, run, RunFolder(out))
        status = federation.wait(run, LIMIT)
        if not status.completed:
            raise FedloraError(f"{status.status}: {status.details}\n{federation.superlink.log()[-3000:]}")
        rounds = RunFolder(out).read_rounds()
    return {"fleet_bytes": fleet, "rounds": rounds, "sizes": [asdict(one) for one in sizes]}


def _start_stand_ins(federation: Loopback, config: RunConfig, folder: Path, checkout: Path) -> Path:
    """All sites' sockets, in a folder."""
    recipe, sockets = folder / "recipe.toml", folder / "sockets"
    recipe.write_text(config.to_toml(), encoding="utf-8")
    sockets.mkdir()
    begin = ["env", "-C", str(checkout), sys.executable, "-m", "benchmarks.deployed.stand_in"]
    service = Service(
        name="stand-in",
        command=[*begin, str(recipe), str(sockets)],
        folder=folder / "stand-in",
        environment=federation.environment,
        ready=lambda service: SERVING in service.log(),
    )
    federation.sites.append(service)  # which are ended with it
    service.start()
    return sockets


def _watch(federation: Loopback, run: int, folder: RunFolder) -> list[Sizes]:
    """Sizes after every round, until the run has ended."""
    found: list[Sizes] = []
    end, ask, free = time.monotonic() + LIMIT, time.monotonic() + ASK, psutil.virtual_memory().available
    server_app: psutil.Process | None = None
    while not folder.record_file.exists() and time.monotonic() < end:
        free = min(free, psutil.virtual_memory().available)
        if free < LEAST_FREE:
            raise FedloraError(f"only {free / MB:.0f} MB of memory are free; give fewer --sites")
        if len(folder.read_rounds()) > len(found):
            server_app = server_app or federation.superlink.processes("flwr-serverapp")[0]
            found.append(_sizes(federation, server_app, free))
            print(f"round {len(found)}: {folder.read_rounds()[-1]['seconds']} s, {found[-1]}", flush=True)
            free = psutil.virtual_memory().available
        if time.monotonic() > ask:
            ask = time.monotonic() + ASK
            if federation.status(run).finished:
                break
        time.sleep(LOOK)
    return found


def _sizes(federation: Loopback, server_app: psutil.Process, free: int) -> Sizes:
    state = federation.folder / "superlink"
    return Sizes(
        server_app=_resident(server_app),
        superlink=_resident(psutil.Process(federation.superlink.pid)),
        database=sum(path.stat().st_size for path in state.glob("state.db*")),
        free=free,
    )


def _resident(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and with it every process that was started
    machine = {"command": command("benchmarks.deployed_load")} | describe_machine()
    config = _config(options)
    with tempfile.TemporaryDirectory(prefix="fedlora-", dir="/tmp") as scratch:
        found = run_load(config, Path(scratch))
    machine["load_average_after"] = load_average()
    facts = {"machine": machine | {"threads": 1}, "config": config.to_mapping(), **found}
    markdown = _markdown(facts)
    print(markdown)
    save(options.out, "deployed_load", facts, markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deployed_load", description="Many sites, one server.")
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model", default=RunConfig().model.name)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _config(options: argparse.Namespace) -> RunConfig:
    return RunConfig.from_mapping(
        {
            "model": {"name": options.model, "head": "frozen", "dtype": "float32", "attention": "eager"},
            "data": {"generated_records": 100 * options.sites},
            "federation": {
                "clients": options.sites, "rounds": options.rounds, "local_steps": 1, "minimum_clients": options.sites
            },
            "training": {"expected_batch_size": 16},
            "privacy": {"delta": 1e-3},
            "engine": {"token_budget": 1024},
            "run": {"device": "cpu", "evaluate_every": 5},
        }
    )  # fmt: skip


def slope(values: Sequence[float]) -> float:
    """Of a straight line through one value a round, by least squares."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])


def _markdown(facts: dict[str, Any]) -> str:
    federation, rounds, sizes = facts["config"]["federation"], facts["rounds"], facts["sizes"]
    half = len(sizes) // 2
    rows = []
    for name, key in (("ServerApp, resident", "server_app"), ("SuperLink, resident", "superlink"),
                      ("SuperLink's database", "database")):  # fmt: skip
        values = [one[key] / MB for one in sizes]
        shown = [f"{value:.1f}" for value in (values[0], values[half], values[-1], max(values))]
        rows.append([name, *shown, f"{slope(values):+.2f}", f"{slope(values[half:]):+.2f}"])
    seconds = Spread.of(line["seconds"] for line in rounds)
    took = f"{seconds.low:.1f} / **{seconds.median:.1f}** / {seconds.high:.1f} s"
    up, down = rounds[-1]["bytes_up"], rounds[-1]["bytes_down"]
    failed = sum(line["clients_failed"] for line in rounds)
    free = min(one["free"] for one in sizes)
    by_round = [
        [number, line["seconds"], *(f"{one[key] / MB:.1f}" for key in ("server_app", "superlink", "database"))]
        for number, (line, one) in enumerate(zip(rounds, sizes, strict=True), start=1)
    ]
    return "\n\n".join(
        [
            "# Many sites, one server",
            conditions(facts["machine"]),
            f"{federation['clients']} sites, each with a SuperNode and a courier of its own, on the machine of the "
            f"server; {len(rounds)} rounds. MB after the first, the middle and the last round, the largest, and by how "
            "much a straight line through them rises in a round: through all, and through the second half.",
            table(["", "first", "middle", "last", "largest", "MB a round", "second half"], rows),
            f"A round starts {federation['clients']} couriers at the same time on these cores; it took {took}. Answers "
            f"missing or not usable in all rounds together: {failed}. A round carries {up / MB:.2f} MB up, "
            f"{down / MB:.2f} MB down. The SuperNodes took "
            f"{facts['fleet_bytes'] / MB:.0f} MB before the first round (resident, pages that they share counted for "
            f"each); of the machine's memory never less than {free / MB:.0f} MB were free. The ServerApp evaluates "
            f"after every {facts['config']['run']['evaluate_every']} rounds. Round by round:",
            table(["round", "seconds", *(row[0] for row in rows)], by_round),
        ]
    )


if __name__ == "__main__":
    main()
