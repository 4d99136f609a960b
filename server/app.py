"""Flower ServerApp: run_config → RunConfig → the same round loop as every run, over Flower's Grid."""

from __future__ import annotations

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config import RunConfig
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import Progress, run_server
from fedlora.federation.workbench import build_workbench
from server.transport import NODES_DEADLINE, ROUND_TIMEOUT, GridTransport, enrol

app = ServerApp()
log = logging.getLogger("fedlora.server")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """`flwr run`: a new run folder at run.out, which should be absolute, since Flower's server has its own folder."""
    from fedlora.experiments.progress import TerminalProgress

    config = RunConfig.from_flower(context.run_config).with_overrides("run.transport=flower")
    folder = RunFolder.create(config)
    log.warning("run folder: %s", folder.path.absolute())
    with TerminalProgress() as progress:
        serve(grid, config, folder, progress)


def serve(
    grid: Grid,
    config: RunConfig,
    folder: RunFolder,
    progress: Progress,
    *,
    nodes_deadline: float = NODES_DEADLINE,
    round_timeout: float = ROUND_TIMEOUT,
) -> None:
    """The server's side of a run over `grid`: enrol the clients, do the rounds that `folder` lacks, write the results.

    Raises:
        FedloraError: clients are missing at the deadline, or no client answered a round.
    """
    workbench = build_workbench(config)
    nodes = enrol(grid, config.federation.clients, nodes_deadline)
    transport = GridTransport(grid=grid, nodes=nodes, timeout=round_timeout)
    run_server(config, folder, workbench, transport, (), progress)
