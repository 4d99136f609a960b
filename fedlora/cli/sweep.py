"""`fedlora sweep`: a grid of runs, from one file to its tables and figures."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.errors import ConfigError, FedloraError, RunInterrupted

if TYPE_CHECKING:
    from fedlora.experiments.sweeps.folder import SweepFolder
    from fedlora.experiments.sweeps.sweep import Cell, Sweep
    from fedlora.experiments.sweeps.tuning import Tuning
    from fedlora.experiments.sweeps.workers import Workers


def sweep(
    file: Annotated[Path, typer.Argument(help="SWEEP.toml: a grid over any keys of a run")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value for all cells, repeatable")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the sweep's folder; runs/<name of the file> without it")] = None,
    workers: Annotated[
        int | None, typer.Option(help="cells at the same time; one a GPU, or one a core, without it", min=1)
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of each cell", min=1)] = 1,
    ray: Annotated[str | None, typer.Option(help="address of a Ray cluster that runs the cells")] = None,
    ray_gpus: Annotated[float, typer.Option(help="GPUs of a cell on the Ray cluster, or a share of one", min=0)] = 0,
    track: Annotated[
        list[str] | None, typer.Option(help="also show the cells to tensorboard, mlflow or wandb; repeatable")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the cells, their noise and the time they would take")
    ] = False,
) -> None:
    """Run every cell of a grid, several at once, and report them. Stopped in any way, the same command goes on."""
    from fedlora.experiments.sweeps.folder import SweepFolder
    from fedlora.experiments.sweeps.sweep import Sweep
    from fedlora.experiments.sweeps.tuning import Tuning
    from fedlora.experiments.trackers import open_trackers

    if ray is not None and workers is not None:
        raise ConfigError("--ray and --workers: the cluster decides how many cells run at once; leave --workers out")
    asked = Sweep.from_toml(file, overrides or [])
    cells, tuning = asked.cells(), Tuning.of(asked)  # all of them now, so that no mistake waits for the last
    if dry_run:
        _print_forecast(cells, tuning, _local_workers(workers, threads)[0])
        return
    open_trackers(track or [])
    path = out or Path("runs") / file.stem
    settings = [part for override in overrides or [] for part in ("--set", override)]
    again = shlex.join(["fedlora", "sweep", str(file), *settings, "--out", str(path)])
    with SweepFolder.claimed(path, asked) as folder, _start_workers(workers, threads, ray, ray_gpus) as running:
        done, failed = _run(asked, folder, running, track or [], again)
        if done:
            _report(path)
    if failed:
        raise FedloraError(
            f"{failed} of {done + failed} cells failed; `fedlora runs list {shlex.quote(str(path))} --status "
            f"failed` says why, and {again} tries them again"
        )


def _start_workers(
    workers: int | None, threads: int, ray: str | None, ray_gpus: float
) -> AbstractContextManager[Workers]:
    if ray is not None:
        from fedlora.experiments.sweeps.cluster import RayWorkers

        return RayWorkers(ray, threads=threads, accelerators=ray_gpus)
    from fedlora.experiments.sweeps.workers import LocalWorkers

    count, accelerators = _local_workers(workers, threads)
    return LocalWorkers(count, threads=threads, accelerators=accelerators)


def _local_workers(asked: int | None, threads: int) -> tuple[int, int]:
    """How many processes, and how many accelerators of this machine they share."""
    from torch.cuda import device_count

    accelerators = device_count()
    return asked or accelerators or max(1, len(os.sched_getaffinity(0)) // threads), accelerators


def _run(sweep: Sweep, folder: SweepFolder, workers: Workers, track: list[str], again: str) -> tuple[int, int]:
    """Run what is not done.

    Returns:
        How many cells and trials are done, and how many failed.

    Raises:
        RunInterrupted: by Ctrl-C.
    """
    from fedlora.experiments.runs.store import Store
    from fedlora.experiments.sweeps.progress import SweepProgress
    from fedlora.experiments.sweeps.run import SweepRun

    with Store.create(folder.path) as store:
        running = SweepRun.open(sweep, folder, store, track)
        try:
            with SweepProgress() as progress:
                running.go(workers, progress)
        except KeyboardInterrupt:
            raise RunInterrupted(f"interrupted, cells done: {running.count('done')}; {again} goes on") from None
        return running.count("done"), running.count("failed")


def _print_forecast(cells: Sequence[Cell], tuning: Tuning | None, workers: int) -> None:
    from fedlora.experiments.sweeps.forecast import forecast, print_forecast
    from fedlora.federation.shelf import Shelf

    trials = tuning.ready({}) if tuning else []
    print_forecast(forecast([*trials, *cells], Shelf()), workers)


def _report(folder: Path) -> None:
    from fedlora.experiments.report import build_report

    typer.echo(f"report: {build_report(folder, folder / 'report')}")
