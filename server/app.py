"""Flower ServerApp: run_config → RunConfig → the same round loop as every run, over Flower's Grid."""

from __future__ import annotations

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config import RunConfig
from fedlora.experiments.progress import TerminalProgress
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import run_server
from fedlora.federation.selection import check_selection
from fedlora.federation.workbench import Workbench, build_workbench
from server.transport import NODES_DEADLINE, ROUND_TIMEOUT, GridTransport, enrol

app = ServerApp()
log = logging.getLogger("fedlora.server")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """`flwr run`: a new run folder at run.out, which should be absolute, since Flower's server has its own folder."""
    config = RunConfig.from_flower(context.run_config).with_overrides("run.transport=flower")
    RunFolder.check_free(config)
    workbench, transport = connect(grid, config)
    folder = RunFolder.create(config)
    log.warning("run folder: %s", folder.path.absolute())
    with TerminalProgress() as progress:
        run_server(config, folder, workbench, transport, (), progress)


def connect(
    grid: Grid, config: RunConfig, *, nodes_deadline: float = NODES_DEADLINE, round_timeout: float = ROUND_TIMEOUT
) -> tuple[Workbench, GridTransport]:
    """What the server needs for its rounds: its own copy of the model, and a way to every client of the run.

    Raises:
        ModelError: the model or a target module cannot be found.
        ConfigError: modules cannot be chosen as asked.
        FedloraError: the nodes do not become the clients of this run before the deadline.
    """
    workbench = build_workbench(config)
    check_selection(workbench)
    nodes = enrol(grid, config.federation.clients, nodes_deadline)
    return workbench, GridTransport(grid=grid, nodes=nodes, timeout=round_timeout)
