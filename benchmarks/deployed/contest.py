"""Who takes part in which federation, and how each one's rounds are measured."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.deployed.apps import make_app
from benchmarks.deployed.clock import read_notes
from benchmarks.deployed.sites import Site
from benchmarks.deployed.timeline import RunWatch, flower_rounds
from deploy.loopback import Loopback
from fedlora.config import RunConfig
from fedlora.errors import FedloraError
from fedlora.experiments.run_folder import RunFolder
from fedlora.models.source import locate_model

FEDLORA, FEDLORA_SECOND, QUICKSTART = "fedlora", "fedlora, 1 s", "Flower's quickstart"
FLOOR_STRATEGY, FLOOR_POLLING, FLOOR_AWAKE = "floor, FedAvg.start", "floor, own messages", "floor, kept awake"
LIMIT = 600.0
"""Seconds for a block."""
ASK, LOOK = 60.0, 0.1
"""Seconds between two looks: at what Flower says of a run, and at what the run does."""

Rounds = list[dict[str, float]]
"""Of each round, seconds by name: round, longest_training, overhead, and parts."""


@dataclass(kw_only=True)
class Contest:
    """Who takes part in which federation."""

    federations: Mapping[str, Loopback]
    sites: Mapping[str, Sequence[Site]]
    """Of each federation, by its name, which is its folder's."""
    config: RunConfig
    rounds: int
    """Of a block."""
    scratch: Path
    checkout: Path
    """What fedlora sends."""
    blocks: int = 0

    def contenders(self) -> dict[str, Callable[[], Rounds]]:
        deployed, flower = self.federations["deployed"], self.federations["flower"]
        floor = functools.partial(self.flower, "flower_floor")
        return {
            FEDLORA: functools.partial(self.fedlora, deployed),
            FEDLORA_SECOND: functools.partial(self.fedlora, flower),
            QUICKSTART: functools.partial(self.flower, "flower_default", flower, self._quickstart_settings()),
            FLOOR_STRATEGY: functools.partial(floor, flower, {"way": "strategy"}),
            FLOOR_POLLING: functools.partial(floor, deployed, {"way": "polling"}),
            FLOOR_AWAKE: functools.partial(floor, deployed, {"way": "awake"}),
        }

    def fedlora(self, federation: Loopback) -> Rounds:
        """One more round than is measured: the last one of a run is evaluated."""
        self.blocks += 1
        out, sites = self.scratch / f"run-{self.blocks}", self.sites[federation.folder.name]
        before = [len(read_notes(site.notes)) for site in sites]
        config = self.config.with_overrides(f"run.seed={self.blocks}", f"federation.rounds={self.rounds + 1}")
        watch = RunWatch(RunFolder(out))
        with watch.watching():
            run = federation.submit({**config.to_flower(), "run.out": str(out)}, app=self.checkout)
            follow(federation, run, watch.folder.record_file.exists)
        notes = [read_notes(site.notes)[known:] for site, known in zip(sites, before, strict=True)]
        return watch.rounds(notes, count=self.rounds)

    def flower(self, package: str, federation: Loopback, settings: Mapping[str, Any]) -> Rounds:
        """An app of Flower's, which notes the end of every round."""
        self.blocks += 1
        ends, sites = self.scratch / f"ends-{self.blocks}.jsonl", self.sites[federation.folder.name]
        before = [len(read_notes(site.notes)) for site in sites]
        chosen = {"rounds": self.rounds, "nodes": len(sites), "notes": str(ends), **settings}
        run = federation.submit({}, app=make_app(self.scratch / f"app-{self.blocks}", package, chosen))
        follow(federation, run, lambda: len(read_notes(ends)) > self.rounds)
        notes = [read_notes(site.notes)[known:] for site, known in zip(sites, before, strict=True)]
        return flower_rounds([line["ended"] for line in read_notes(ends)], notes)

    def _quickstart_settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "model-folder": str(locate_model(config.model.name).folder),
            "rank": config.adapter.rank,
            "batch-size": config.training.expected_batch_size,
            "local-steps": config.federation.local_steps,
        }


def follow(federation: Loopback, run: int, done: Callable[[], bool]) -> None:
    """Until `done`, and then until Flower says so too; its command takes a core for a second, so it is asked rarely.

    Raises:
        FedloraError: the run failed, or takes too long.
    """
    end, ask = time.monotonic() + LIMIT, time.monotonic() + ASK
    while not done():
        if time.monotonic() > ask:
            status, ask = federation.status(run), time.monotonic() + ASK
            if status.finished and not done():
                raise FedloraError(f"{status.status}: {status.details}\n{federation.superlink.log()[-3000:]}")
        if time.monotonic() > end:
            raise FedloraError(f"not done after {LIMIT:g} s:\n{federation.superlink.log()[-3000:]}")
        time.sleep(LOOK)
    federation.wait(run, LIMIT)
