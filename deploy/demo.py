"""A whole deployment on this machine, in two minutes: `make deploy-demo`, or `python -m deploy.demo --data FOLDER`.

One SuperLink, three SuperNodes and three site daemons, with TLS and SuperNode authentication. Each site has a third of
the training records of SST-2; the server has the public validation split and no other record. Everything lies in one
new folder below runs/, and every process is ended, also after Ctrl-C.

Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.loopback import EXECUTABLES, ROOT, Loopback
from fedlora.data.glue import Records, load_records
from fedlora.data.tasks import TASKS
from fedlora.errors import FedloraError
from fedlora.experiments.progress import print_result
from fedlora.experiments.terminal import shown_bytes, shown_epsilon
from fedlora.randomness import PublicSeed

SITES = 3
TASK = "sst2"
DELTA = 1e-5
GLUE = ROOT.parent / "shared" / "glue" / TASK
SHORT = {"federation.rounds": 5, "federation.local_steps": 5}
LIMIT = 900.0
"""Seconds until the demo gives up."""
GENERATED = 6000
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ROW = "{round:>5}  {phase:<10}  {metric:>8}  {epsilon:>8}  {traffic:>9}  {seconds:>7}  {clients}"


def run_demo(folder: Path, source: str, settings: Mapping[str, Any]) -> None:
    """Make the sites, start everything, and follow one run to its end.

    Args:
        folder: new; receives sites, keys, logs and the run.
        source: a folder with SST-2, or "generated".
        settings: further keys of the run's configuration.

    Raises:
        FedloraError: the run failed, or a process did not start; with what it said.
    """
    divide(source, folder)
    threads = str(max(1, (os.cpu_count() or 1) // SITES))
    with Loopback(folder / "federation", sites=SITES, environment={"OMP_NUM_THREADS": threads}) as federation:
        node_configs = []
        for site in range(SITES):
            home = folder / f"site-{site}"
            init_site(home, federation.environment)
            federation.start_site(home / "site.toml")
            node_configs.append(f'partition-id={site} site="{home / "site.sock"}"')
        say(f"{SITES} site daemons, each with its own records, policy and ledger")
        federation.start_superlink()
        federation.start_supernodes(node_configs)
        say(f"SuperLink at 127.0.0.1:{federation.port} (TLS), {SITES} SuperNodes, each with a registered key")
        out = folder / "run"
        run = federation.submit(
            {
                "run.out": str(out),
                "data.task": TASK,
                "data.source": str(folder / "public"),
                "federation.clients": SITES,
                "privacy.delta": DELTA,
                **SHORT,
                **settings,
            }
        )
        say(f"submitted: run {run}")
        for row in follow(federation, run, out / "rounds.jsonl"):
            print(row, flush=True)
        status = federation.status(run)
        if not status.completed:
            raise FedloraError(f"the run is {status.status}: {status.details}\n{federation.superlink.log()[-3000:]}")
    print_result(out)


def divide(source: str, folder: Path) -> None:
    """A third of the training records for each site, and the validation split for the server alone."""
    seed = PublicSeed.from_int(0)
    train = load_records(TASK, source, "train", generated_records=GENERATED, seed=seed)
    public = load_records(TASK, source, "validation", generated_records=GENERATED, seed=seed)
    order = np.random.default_rng(0).permutation(len(train))
    for site, mine in enumerate(np.array_split(order, SITES)):
        write(train.subset(mine), folder / f"site-{site}" / "records" / "train.parquet")
    write(public, folder / "public" / "validation.parquet")
    said = "generated, since there is no copy of SST-2 here" if source == "generated" else f"from {source}"
    say(f"SST-2 {said}: {len(train)} records on {SITES} sites, {len(public)} public ones at the server")


def write(records: Records, path: Path) -> None:
    path.parent.mkdir(parents=True)
    texts = dict(zip(TASKS[TASK].text_columns, records.texts, strict=True))
    pq.write_table(pa.table({**texts, "label": records.labels}), path)


def init_site(home: Path, environment: Mapping[str, str]) -> None:
    """`fedlora site init`, as the owner of the records would."""
    command = [str(EXECUTABLES / "fedlora"), "site", "init", str(home), "--task", TASK]
    command += ["--data", str(home / "records"), "--name", home.name, "--max-delta", str(DELTA)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise FedloraError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def follow(federation: Loopback, run: int, rounds: Path) -> Iterator[str]:
    """A row for each round as it is done, until the run has finished."""
    heads = {"round": "round", "phase": "phase", "metric": "accuracy", "epsilon": "ε spent"}
    yield ROW.format(**heads, traffic="traffic", seconds="time", clients="sites")
    shown, end = 0, time.monotonic() + LIMIT
    while True:
        finished = federation.status(run).finished
        lines = rounds.read_text(encoding="utf-8").splitlines() if rounds.exists() else []
        for line in lines[shown:]:
            yield shown_round(json.loads(line))
        shown = len(lines)
        if finished:
            return
        if time.monotonic() > end:
            raise FedloraError(f"the run has not finished after {LIMIT:g} s:\n{federation.superlink.log()[-3000:]}")
        time.sleep(2.0)


def shown_round(line: Mapping[str, Any]) -> str:
    failed = f" ({line['clients_failed']} failed)" if line["clients_failed"] else ""
    return ROW.format(
        round=line["round"],
        phase=line["phase"],
        metric="" if line["metric"] is None else f"{line['metric']:.4f}",
        epsilon=shown_epsilon(float(line["epsilon_max"])),
        traffic=shown_bytes(line["bytes_up"] + line["bytes_down"]),
        seconds=f"{line['seconds']:.1f} s",
        clients=f"{line['clients_ok']}{failed}",
    )


def say(text: str) -> None:
    print(f"· {text}", flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default=str(GLUE) if GLUE.is_dir() else "generated", help="SST-2, or generated")
    parser.add_argument("--folder", type=Path, help="new folder for everything; below runs/ otherwise")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run, value in JSON")
    chosen = parser.parse_args(arguments)
    folder = (chosen.folder or Path("runs") / time.strftime("deploy-demo-%Y%m%d-%H%M%S")).absolute()
    try:
        settings = {key: json.loads(value) for key, _, value in (text.partition("=") for text in chosen.set)}
        folder.mkdir(parents=True, mode=0o700)
    except (ValueError, OSError) as error:
        parser.error(f"{error}; --set takes KEY=VALUE in JSON, --folder one that does not exist")
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        run_demo(folder, chosen.data, settings)
    except FedloraError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fedlora: interrupted; every process is ended", file=sys.stderr)
        return 130
    say(f"every process is ended; sites, keys and logs: {folder}")
    say(f"what a site was charged: fedlora budget {folder}/site-0/ledger.sqlite")
    return 0


def _interrupt(_: int, __: Any) -> NoReturn:
    """Once is enough: a second Ctrl-C must not break the clean-up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
