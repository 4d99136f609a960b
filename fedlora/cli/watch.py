"""`fedlora watch`: a run as it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch(
    run_dir: Annotated[Path, typer.Argument(help="the run's folder, wherever and however it runs")],
    once: Annotated[bool, typer.Option("--once", help="print how it stands and end, for scripts and pipes")] = False,
) -> None:
    """Watch a run: rounds, metric, ε of each client, who is waited for. Reads its folder and changes nothing.

    Ends with the run: 0 if it is done, 1 if it failed. Ctrl-C ends the view, and not the run.
    """
    from fedlora.experiments.watch import watch as show

    try:
        well = show(run_dir, once=once)
    except KeyboardInterrupt:
        return
    if not well:
        raise typer.Exit(1)
