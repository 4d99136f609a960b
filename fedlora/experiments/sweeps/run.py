"""Running a sweep: every cell once, in whatever order workers end them, and from where it stopped if it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedlora.errors import StoreError
from fedlora.experiments.run_folder import RunFolder, to_json
from fedlora.experiments.runs.gathering import stored_run
from fedlora.experiments.runs.store import Store
from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.experiments.sweeps.folder import SweepFolder
from fedlora.experiments.sweeps.sweep import Cell, Sweep
from fedlora.experiments.sweeps.tuning import Tuning
from fedlora.experiments.sweeps.worker import Job
from fedlora.experiments.sweeps.workers import Workers

_LEAST_FREE = 2**18  # bytes


class Watcher(Protocol):
    """Whoever watches a sweep."""

    def start(self, *, total: int, done: int) -> None:
        """`done` of `total` cells had ended before."""
        ...

    def ended(self, cell: Cell, run: StoredRun) -> None: ...

    def look(self, started: float) -> None:
        """Called about once a second: how much of cells that have not ended is done, in cells."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How many cells and trials of a sweep ended how.

    Attributes:
        unsettled: cells that cannot be run, because all trials for their settings failed.
    """

    done: int
    failed_cells: int
    failed_trials: int
    unsettled: int

    @property
    def whole(self) -> bool:
        return not (self.failed_cells or self.failed_trials or self.unsettled)

    def __str__(self) -> str:
        counts = {
            "done": self.done,
            "failed cells": self.failed_cells,
            "failed trials, which is final": self.failed_trials,
            "cells without settings, since all their trials failed": self.unsettled,
        }
        return ", ".join(f"{what}: {count}" for what, count in counts.items() if count) or "nothing done yet"


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """A sweep while it runs."""

    sweep: Sweep
    folder: SweepFolder
    store: Store
    tuning: Tuning | None
    results: dict[str, StoredRun]
    """What is known of cells, by their digest."""
    trackers: tuple[str, ...] = ()
    """That every cell is shown to, by name."""
    tried: set[str] = field(default_factory=set)
    """Digests of the cells that this process has run: one that fails is not tried again at once."""

    @classmethod
    def open(cls, sweep: Sweep, folder: SweepFolder, store: Store, trackers: Sequence[str] = ()) -> SweepRun:
        """With what an earlier process has left."""
        return cls(
            sweep=sweep,
            folder=folder,
            store=store,
            tuning=Tuning.of(sweep),
            results={run.digest: run for run in store.runs()},
            trackers=tuple(trackers),
        )

    def known_cells(self) -> list[Cell]:
        """Those whose settings are known by now: trials, and the cells whose trials have ended."""
        if self.tuning is None:
            return self.sweep.cells()
        return [*self.tuning.ready(self.results), *self.sweep.cells(self.tuning.chosen(self.results))]

    def to_do(self) -> list[Cell]:
        """Those of them that are not done. A cell that failed in an earlier process is tried again; a trial is not.

        It counts as tried, and cells may rest on the choice that was made without it. One seed after the other: a sweep
        that is stopped early has something of everything.
        """
        left = [cell for cell in self.known_cells() if not self._is_settled(cell) and cell.digest not in self.tried]
        return sorted(left, key=lambda cell: cell.config.run.seed)

    def is_done(self, cell: Cell) -> bool:
        """Whether its run has ended well and says how its settings were chosen, if they were."""
        run = self.results.get(cell.digest)
        if run is None or run.record is None:
            return False
        return self.tuning is None or cell.role == "trial" or "tuning" in run.record

    def _is_settled(self, cell: Cell) -> bool:
        return cell.digest in self.results if cell.role == "trial" else self.is_done(cell)

    def go(self, workers: Workers, watcher: Watcher) -> None:
        """Run what is not done; a cell that fails is stored as failed and stops no other.

        Raises:
            StoreError: what has ended cannot be kept, or the disk is full; the next process finds it in the folders.
        """
        total = sum(1 for _ in self.sweep.points()) + (self.tuning.total() if self.tuning else 0)
        watcher.start(total=total, done=sum(map(self.is_done, self.known_cells())))
        while cells := self.to_do():
            self.tried.update(cell.digest for cell in cells)
            self._run(cells, workers, watcher)

    def ended(self) -> Ended:
        """How it stands."""
        runs = [run for cell in self.known_cells() if (run := self.results.get(cell.digest)) is not None]
        failed = [run.role for run in runs if run.status == "failed"]
        return Ended(
            done=len(runs) - len(failed),
            failed_cells=failed.count("cell"),
            failed_trials=failed.count("trial"),
            unsettled=len(self.tuning.failed(self.results)) if self.tuning else 0,
        )

    def _run(self, cells: list[Cell], workers: Workers, watcher: Watcher) -> None:
        jobs = {self.folder.run_folder(cell).absolute(): cell for cell in cells}
        waiting = dict(jobs)
        work = [Job(config=cell.config, folder=path, trackers=self.trackers) for path, cell in jobs.items()]
        for answer in workers.run(work):
            if answer is None:
                watcher.look(sum(_progress(RunFolder(path), cell) for path, cell in waiting.items()))
                continue
            job, error = answer
            cell = waiting.pop(job.folder)
            if error:
                self._refuse_full_disk()
            run = self._keep(cell, error)
            watcher.ended(cell, run)

    def _refuse_full_disk(self) -> None:
        """Every cell would fail on it, and none for a reason of its own.

        Raises:
            StoreError: there is hardly a byte left.
        """
        free = shutil.disk_usage(self.folder.path).free
        if free < _LEAST_FREE:
            raise StoreError(
                f"the disk of {self.folder.path} is full ({free} bytes left); free some space, and the same command "
                "goes on"
            )

    def _keep(self, cell: Cell, error: str) -> StoredRun:
        run = self._failed(cell, error) if error else self._ended(cell)
        self.store.put(run)
        self.results[cell.digest] = run
        return run

    def _ended(self, cell: Cell) -> StoredRun:
        folder = RunFolder(self.folder.run_folder(cell))
        try:
            run = self._stored(cell)
            if self.tuning is not None and cell.role == "cell" and run.record is not None:
                facts = self.tuning.facts(cell, self.results, run.record, self.folder.path)
                _rewrite(folder, {**run.record, "tuning": facts})
                run = self._stored(cell)
        except StoreError as damaged:
            what = "it counts as tried and failed" if cell.role == "trial" else f"delete {folder.path} to run it again"
            return self._failed(cell, f"{damaged}; {what}")
        return run

    def _stored(self, cell: Cell) -> StoredRun:
        return stored_run(
            self.folder.run_folder(cell),
            relative_to=self.folder.path,
            role=cell.role,
            axes=cell.axes,
            digest=cell.digest,
        )

    def _failed(self, cell: Cell, error: str) -> StoredRun:
        return StoredRun(
            folder=cell.folder,
            digest=cell.digest,
            role=cell.role,
            axes=cell.axes,
            error=error,
            config=to_json(cell.config.to_mapping()),
        )


def _rewrite(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """A run is over before anyone knows what its trials cost: its report and the adapter's card have to say it too."""
    from fedlora.experiments.account import write_account  # and with it torch, which no other part of this needs

    write_account(folder, record)


def _progress(folder: RunFolder, cell: Cell) -> float:
    """Share of a cell's rounds that are done, the prototype release counted as one more."""
    return min(1.0, len(folder.read_rounds()) / (cell.config.federation.rounds + 1)) if folder.path.exists() else 0.0
