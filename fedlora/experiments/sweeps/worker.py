"""What a worker of a sweep does: one cell after the other, with what they have in common kept in memory."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import RunConfig
from fedlora.errors import FedloraError
from fedlora.experiments.run_folder import RunFolder

if TYPE_CHECKING:
    from fedlora.federation.server import RoundReport
    from fedlora.federation.shelf import Shelf


@dataclass(frozen=True, kw_only=True)
class Job:
    """A cell as it is sent to a worker."""

    config: RunConfig
    folder: Path
    """Of its run, absolute; every worker must see it."""
    trackers: tuple[str, ...] = ()
    """That its rounds are shown to, by name."""


def serve(jobs: Connection, threads: int, accelerator: str | None) -> None:
    """Do the jobs that arrive and answer each with its error, or an empty text; ends with its parent.

    Args:
        jobs: a duplex pipe.
        threads: of every cell, on the CPU. Not left to the machine: how sums are divided among threads decides how they
            are rounded, and a cell's result is not to depend on how many workers there are.
        accelerator: the one that this worker uses, by its number; None for all or none.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells everyone, and the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported
    if accelerator is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = accelerator
    worker = Worker()
    while True:
        try:
            job: Job = jobs.recv()
        except EOFError:
            return
        jobs.send(worker.run(job))


class Worker:
    """Runs cells in this process."""

    def __init__(self) -> None:
        self._shelf: Shelf | None = None

    def run(self, job: Job) -> str:
        """Do a cell, or what is left of it; "" if its folder holds a whole run now, else why not, in one line.

        What others raise may quote a record: it goes to a log beside the folder, and never into a store or a report.
        """
        folder = RunFolder(job.folder)
        if folder.record_file.exists():
            return ""
        try:
            self._run(job, folder)
        except FedloraError as error:
            return " ".join(str(error).split())
        except Exception as error:  # one cell's fault must not end the others
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            job.folder.with_suffix(".log").write_text(traceback.format_exc(), encoding="utf-8")
            return f"{type(error).__name__}; {job.folder.with_suffix('.log').name} beside its folder has all of it"
        job.folder.with_suffix(".log").unlink(missing_ok=True)
        return ""

    def _run(self, job: Job, folder: RunFolder) -> None:
        from fedlora.experiments.simulate import resume, simulate
        from fedlora.experiments.trackers import open_trackers
        from fedlora.experiments.trackers.tracker import Tracked
        from fedlora.federation.shelf import Shelf

        def warn(text: str) -> None:
            sys.stderr.write(f"fedlora: {job.folder.name}: {text}\n")

        self._shelf = self._shelf or Shelf()
        with Tracked(Unwatched(), open_trackers(job.trackers), warn) as progress:
            if folder.config_file.exists():
                resume(job.folder, progress, shelf=self._shelf)
            else:
                _remove_empty_start(job.folder)
                simulate(RunConfig.from_mapping(_at(job.config, job.folder)), progress, shelf=self._shelf)


class Unwatched:
    """Nobody watches a cell's rounds one by one: rounds.jsonl tells how far it is."""

    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...

    def round(self, report: RoundReport) -> None: ...

    def finish(self, record: Mapping[str, Any]) -> None: ...


def _at(config: RunConfig, folder: Path) -> dict[str, dict[str, Any]]:
    tables = config.to_mapping()
    tables["run"]["out"] = str(folder)
    return tables


def _remove_empty_start(folder: Path) -> None:
    """A kill or a full disk while a folder was made: without a config.toml nothing was charged or computed."""
    if folder.is_dir():
        for left in folder.glob("*.partial"):
            left.unlink()


def _end_with_parent() -> None:
    """A worker whose sweep was killed would go on for hours, and be in the way of the one that takes over."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
