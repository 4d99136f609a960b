"""The process that test_kill.py kills: one site under its policy, round after round, prepared once and then forked.

    python -m tests.federation.doomed_site <config.toml> <site.toml>

reads one JSON order a line; forks a child for it, says the child's process id, and once that has ended how. Where the
child is lies in a shared file of one byte, which outlives it.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

PARTS = ("opening", "preparing", "reserving", "computing", "settling", "releasing")


class Whereabouts:
    """Which part of a round the child is in, and how often it came to each, for another process to see."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 1 + len(PARTS))

    @classmethod
    def create(cls, path: Path) -> Self:
        path.write_bytes(bytes(1 + len(PARTS)))
        return cls(path)

    def enter(self, part: str) -> None:
        number = PARTS.index(part)
        self._page[0] = number
        self._page[1 + number] += 1

    @property
    def part(self) -> str:
        return PARTS[self._page[0]]

    def times(self, part: str) -> int:
        return self._page[1 + PARTS.index(part)]


def serve(config_file: Path, policy_file: Path) -> None:
    """Load everything, then fork a child per order."""
    cohort, instruction = prepare(config_file, policy_file)
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            do_rounds(cohort, instruction, json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def prepare(config_file: Path, policy_file: Path) -> tuple[Any, Any]:
    """A cohort of one without its ledger, as a site's desk makes it, and what a server sends."""
    import torch

    from fedlora.config import RunConfig
    from fedlora.federation.cohort import Cohort
    from fedlora.federation.messages import RoundInstruction
    from fedlora.federation.schedule import make_schedule
    from fedlora.federation.server import initial_state
    from fedlora.federation.shelf import Shelf
    from fedlora.federation.sites import encode_training_data, load_own_data, localised, make_site
    from fedlora.federation.workbench import build_workbench
    from fedlora.privacy.ledger import Ledger
    from fedlora.privacy.policy import SitePolicy

    torch.set_num_threads(1)
    policy = SitePolicy.from_toml(policy_file)
    config = localised(RunConfig.from_toml(config_file), policy)
    data, bench = load_own_data(config, 0, Shelf()), build_workbench(config)
    site = make_site(config, data, make_schedule(config), 0, policy)
    dataset = encode_training_data(bench, data)
    cohort = Cohort(workbench=bench, dataset=dataset, sites=[site], ledger=Ledger.in_memory())
    state = initial_state(bench, "unnamed")

    def instruction(run: str, entry: Any) -> RoundInstruction:
        return RoundInstruction(
            run_id=run,
            round_index=entry.index,
            phase=entry.phase,
            layout_digest=bench.payload_layout(entry.phase).digest,
            theta=state.theta,
            head=state.head,
        )

    return cohort, instruction


def do_rounds(cohort: Any, instruction: Any, order: dict[str, Any]) -> None:
    """In the child: rounds from `order["start"]` on until killed, each released as to a server's disk."""
    from fedlora.errors import RoundRepeated
    from fedlora.federation import wire
    from fedlora.privacy.ledger import Ledger, Request
    from fedlora.randomness import SecretRoot

    where = Whereabouts(Path(order["whereabouts"]))

    class Watched(Ledger):
        def reserve(self, requests: Sequence[Request]) -> list[int]:
            where.enter("reserving")
            return super().reserve(requests)

        def settle(self, reservations: Sequence[int]) -> None:
            where.enter("settling")
            super().settle(reservations)
            where.enter("releasing")

    def compute(*arguments: Any) -> Any:
        where.enter("computing")
        return train(*arguments)

    train, cohort._train = cohort._train, compute
    try:
        where.enter("opening")
        cohort.ledger = Watched.open(Path(order["ledger"]))
        (site,) = cohort.sites
        site.secret = SecretRoot.from_os()  # a fork has its parent's, which is another process's in life
        for entry in site.schedule[order["start"] : order["stop"]]:
            where.enter("preparing")
            try:
                (update,) = cohort.run(instruction(order["run"], entry))
            except RoundRepeated:
                continue
            release(Path(order["outside"]) / f"{order['run']}-{entry.index}", wire.encode_update(update))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def release(path: Path, message: bytes) -> None:
    """What the server has once its file has a byte in it."""
    with path.open("wb", buffering=0) as file:
        file.write(message)
        os.fsync(file.fileno())


if __name__ == "__main__":
    serve(*map(Path, sys.argv[1:]))
