"""python -m benchmarks.deployed_round: what a deployed round takes beside training, on one machine.

One SuperLink and three SuperNodes with TLS and SuperNode authentication, two times: as deploy/ starts them, and with
Flower's own second between two looks for tasks. Contenders send their app to them, in blocks of a few rounds that take
turns. A round is the time from one round's beginning at the server to the next one's; its overhead is that less the
longest time that any site trained in it. Aim: fedlora's overhead at most a fifth of that of Flower's quickstart.

fedlora              server.app, courier and daemon, as deploy/ starts them
fedlora, 1 s         the same on SuperNodes as Flower starts them
Flower's quickstart  benchmarks/flower_default: everything anew for every message, FedAvg.start
floor                benchmarks/flower_floor: an app that does nothing, in three ways
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.deployed.contest import FEDLORA, FEDLORA_SECOND, FLOOR_POLLING, QUICKSTART, Contest, Rounds
from benchmarks.deployed.sites import copy_checkout, make_sites, start
from benchmarks.deployed.timeline import PARTS
from benchmarks.machine import describe_machine, load_average
from benchmarks.report import RESULTS, command, conditions, save, table
from benchmarks.spread import Spread, ratios, take_turns
from fedlora.config import RunConfig

AIM = 5.0
SITES = 3
ORDER = random.Random(0)  # of turns
QUICKSTART_PARTS = ("waiting", "importing", "loading", "training", "returning")
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
INTERVAL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and with it every process that was started
    machine = {"command": command("benchmarks.deployed_round")} | describe_machine()
    config = _config(options)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedlora-", dir="/tmp")))
        checkout = copy_checkout(scratch / "checkout")
        federations, sites = {}, {}
        for name, interval in (("deployed", {}), ("flower", {INTERVAL: "1"})):
            sites[name] = make_sites(scratch / f"{name}-sites", config)
            federations[name] = start(stack, scratch / name, sites[name], checkout, QUIET | interval)
        contest = Contest(
            federations=federations, sites=sites, config=config, rounds=1, scratch=scratch, checkout=checkout
        )
        contenders = {name: task for name, task in contest.contenders().items() if name not in options.without}
        for name, task in contenders.items():  # fills caches: byte code, tokenised records, calibrated noise
            print(f"once before: {name}, {task()[0]['round']:.2f} s", flush=True)
        contest.rounds = options.rounds
        blocks = take_turns({name: _told(name, task) for name, task in contenders.items()}, options.blocks, ORDER)
    machine["load_average_after"] = load_average()
    facts: dict[str, Any] = {"machine": machine | {"threads": 1}, "sites": SITES, "config": config.to_mapping()}
    facts["ways"] = {name: _way(blocks, name) for name in blocks}
    markdown = _markdown(facts)
    print(markdown)
    save(options.out, "deployed_round", facts, markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deployed_round", description="A deployed round.")
    parser.add_argument("--blocks", type=int, default=4, help="turns of each contender")
    parser.add_argument("--rounds", type=int, default=5, help="of a block")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contenders to leave out")
    parser.add_argument("--model", default=RunConfig().model.name)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _config(options: argparse.Namespace) -> RunConfig:
    """One private step of a small batch; nothing but the last round is evaluated."""
    return RunConfig.from_mapping(
        {
            "model": {"name": options.model, "head": "frozen", "dtype": "float32", "attention": "eager"},
            "data": {"generated_records": 200 * SITES},
            "federation": {"clients": SITES, "local_steps": 1},
            "training": {"expected_batch_size": 8, "learning_rate": 0.5},
            "privacy": {"delta": 1e-3},
            "engine": {"token_budget": 1024},
            "run": {"device": "cpu", "evaluate_every": 1000},
        }
    )


def _told(name: str, task: Callable[[], Rounds]) -> Callable[[], Rounds]:
    def told() -> Rounds:
        rounds = task()
        load = load_average()[0]
        print(name, [f"{one['overhead']:.2f}" for one in rounds], f"load {load}", flush=True)
        return [one | {"load": load} for one in rounds]

    return told


def _markdown(facts: dict[str, Any]) -> str:
    ways, config = facts["ways"], facts["config"]
    rows = []
    for name, way in ways.items():
        seconds = (Spread.of(one[key] for one in way["rounds"]) for key in ("overhead", "round", "longest_training"))
        rows.append([name, *map(str, seconds), way["shown"]])
    parts = [
        [PARTS[part], *(_median(ways[name], part) for name in (FEDLORA, FEDLORA_SECOND) if name in ways)]
        for part in ("waiting", "starting", "daemon", "training", "returning", "server")
    ]
    load = Spread.of(one["load"] for way in ways.values() for one in way["rounds"])
    texts = [
        "# A deployed round, beside training",
        conditions(facts["machine"]),
        f"{facts['sites']} sites on one machine, TLS and SuperNode authentication, {config['model']['name']}, LoRA r = "
        f"{config['adapter']['rank']} on query and value, B alone travels, one step of "
        f"{config['training']['expected_batch_size']} records, one thread for each process. "
        f"{len(ways[FEDLORA]['rounds'])} rounds each, in blocks that take turns; seconds, smallest / **median** / "
        "largest. A round lasts until the next one begins at the server; its overhead is that less the longest time "
        f"that any site trained in it. Load average after each turn: {load}.",
        table(["", "overhead", "round", "training", "overhead, times fedlora's"], rows),
    ]
    if QUICKSTART in ways:
        met = ways[QUICKSTART]["times_fedlora"]["median"] >= AIM
        texts.append(f"Aim, the quickstart's overhead at least {AIM:g} times fedlora's: {'met' if met else 'missed'}.")
    if FLOOR_POLLING in ways:
        beyond = [f"{name} {way['beyond_floor']}" for name, way in ways.items() if not name.startswith("floor")]
        texts.append(
            "The floors do nothing: an app that imports Flower alone and sends back what came, with FedAvg.start, with "
            "messages looked for as often as fedlora's server does, and with a second message behind each, so that a "
            "SuperNode finds something to do and does not sleep. That process then takes the time that the sleep took. "
            f"Overhead beyond *{FLOOR_POLLING}* in the same turn, seconds: {'; '.join(beyond)}."
        )
    texts += ["Where fedlora's rounds go, along the site that answered last; medians:"]
    texts += [table(["", *(name for name in (FEDLORA, FEDLORA_SECOND) if name in ways)], parts)]
    if QUICKSTART in ways:
        parts = [[PARTS[part], _median(ways[QUICKSTART], part)] for part in QUICKSTART_PARTS]
        texts += ["And the quickstart's, along the site that trained last:", table(["", QUICKSTART], parts)]
    return "\n\n".join(texts)


def _median(way: Mapping[str, Any], part: str) -> str:
    seen = [one[part] for one in way["rounds"] if part in one]
    return f"{statistics.median(seen):.2f}" if seen else "not seen"


def _way(blocks: Mapping[str, Sequence[Rounds]], name: str) -> dict[str, Any]:
    """All rounds of a contender, and its overhead against fedlora's and the floor's in the same turn."""
    own, fedlora = _of_turns(blocks[name]), _of_turns(blocks[FEDLORA])
    slower, floor = ratios(own, fedlora), _of_turns(blocks.get(FLOOR_POLLING, blocks[name]))
    return {
        "rounds": [{key: round(value, 4) for key, value in one.items()} for block in blocks[name] for one in block],
        "times_fedlora": slower.to_json(),
        "shown": str(slower),
        "beyond_floor": str(Spread.of(mine - least for mine, least in zip(own, floor, strict=True))),
    }


def _of_turns(blocks: Sequence[Rounds]) -> list[float]:
    return [statistics.median(one["overhead"] for one in block) for block in blocks]


if __name__ == "__main__":
    main()
