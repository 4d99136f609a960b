"""`fedlora sweep`: a grid of runs, from one file to its tables and figures."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.errors import ConfigError, FedloraError, RunInterrupted

if TYPE_CHECKING:
    from fedlora.experiments.sweeps.folder import SweepFolder
    from fedlora.experiments.sweeps.run import Ended
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
    open_trackers(track or [])
    if dry_run:
        _print_forecast(cells, tuning, _local_workers(workers, threads)[0])
        return
    path = out or Path("runs") / file.stem
    again = _command(
        file,
        {"--set": overrides, "--out": [path], "--workers": [workers], "--threads": [threads if threads > 1 else None]}
        | {"--ray": [ray], "--ray-gpus": [ray_gpus or None], "--track": track},
    )
    with _start_workers(workers, threads, ray, ray_gpus) as running, SweepFolder.claimed(path, asked) as folder:
        ended = _run(asked, folder, running, track or [], again)
        if ended.done:
            _report(path)
    if not ended.whole:
        retry = f"; {again} tries failed cells again" if ended.failed_cells else ""
        raise FedloraError(f"{ended}; `fedlora runs list {shlex.quote(str(path))} --status failed` says why{retry}")


def _command(file: Path, options: Mapping[str, Sequence[object] | None]) -> str:
    """What was typed, as far as it was."""
    words = ["fedlora", "sweep", str(file)]
    for name, values in options.items():
        words += [str(word) for value in values or () if value is not None for word in (name, value)]
    return shlex.join(words)


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


def _run(sweep: Sweep, folder: SweepFolder, workers: Workers, track: list[str], again: str) -> Ended:
    """Run what is not done.

    Raises:
        RunInterrupted: by Ctrl-C or SIGTERM.
    """
    from fedlora.experiments.runs.store import Store
    from fedlora.experiments.sweeps.progress import SweepProgress
    from fedlora.experiments.sweeps.run import SweepRun

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as batch systems end what takes too long
    with Store.create(folder.path) as store:
        running = SweepRun.open(sweep, folder, store, track)
        try:
            with SweepProgress() as progress:
                running.go(workers, progress)
        except KeyboardInterrupt:
            raise RunInterrupted(f"interrupted, {running.ended()}; {again} goes on") from None
        finally:
            signal.signal(signal.SIGTERM, before)
        return running.ended()


def _print_forecast(cells: Sequence[Cell], tuning: Tuning | None, workers: int) -> None:
    from fedlora.experiments.sweeps.forecast import forecast, print_forecast
    from fedlora.federation.shelf import Shelf

    trials = tuning.ready({}) if tuning else []
    print_forecast(forecast([*trials, *cells], Shelf()), workers)


def _report(folder: Path) -> None:
    from fedlora.cli.report import report

    report(folder)
    typer.echo(f"runs     fedlora runs list {shlex.quote(str(folder))}")
