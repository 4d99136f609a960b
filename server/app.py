"""Flower ServerApp: run_config → RunConfig → the same round loop as every run, over Flower's Grid.

It ends honestly: a run that fails raises, so that Flower calls it failed, and says why in the run folder. Submitted
once more with the same `run.out`, an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import logging
import math
import os

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.experiments.progress import TerminalProgress
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import Progress, run_server
from fedlora.experiments.trackers.prometheus import trackers_from
from fedlora.experiments.trackers.tracker import Tracked
from fedlora.federation.selection import check_selection
from fedlora.federation.workbench import Workbench, build_workbench
from fedlora.monitoring.logs import configure_logging_from
from fedlora.site.protocol import LARGEST_PAYLOAD
from server.answers import RoundAnswers
from server.roster import Roster
from server.transport import ASK_SILENT_AGAIN, GridTransport

app = ServerApp()
log = logging.getLogger("fedlora.server")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """`flwr run`: the run of `run.out`, which should be absolute, since Flower's server has a folder of its own.

    FEDLORA_LOG and FEDLORA_METRICS in its environment say how it is watched (docs/watching.md).
    """
    configure_logging_from(os.environ)
    trackers = trackers_from(os.environ)
    workbench = prepare(RunConfig.from_flower(context.run_config).with_overrides("run.transport=flower"))
    folder = RunFolder.of(workbench.config)
    log.warning("run folder: %s", folder.path.absolute())
    with TerminalProgress() as progress, Tracked(progress, trackers, log.warning) as tracked:
        serve(grid, workbench, folder, tracked)


def prepare(config: RunConfig) -> Workbench:
    """The server's own copy of the model.

    Raises:
        ModelError: the model or a target module cannot be found.
        ConfigError: modules cannot be chosen as asked, or no site would take an instruction that large.
    """
    workbench = build_workbench(config)
    check_selection(workbench)
    folded = workbench.folded.size if workbench.method.folds else 0
    if (size := 4 * (workbench.layout.size + folded) + _MOST_BESIDE) > LARGEST_PAYLOAD:
        raise ConfigError(
            f"an instruction of this run has {size / 1e6:.0f} MB and a site takes {LARGEST_PAYLOAD / 1e6:.0f} at most; "
            "adapt fewer modules (adapter.target_modules), or use an adapter.method that folds nothing into the base"
        )
    return workbench


_MOST_BESIDE = 2**20
"""Bytes of an instruction beside the adapter and what is added to the base: a head, gates, facts."""


def serve(grid: Grid, workbench: Workbench, folder: RunFolder, progress: Progress, workers: int | None = None) -> None:
    """Do the rounds that `folder` lacks with the nodes of `grid`.

    Args:
        workers: nodes that share the clients, where the caller has started them itself in Flower's simulation engine;
            None: every node is one client, as wherever a node may be somebody else's.

    Raises:
        RunFolderError: the folder holds no state of this run, or another process is at work on it.
        FedloraError: too few nodes become clients of this run before the deadline, or the run failed.
    """
    config, federation = workbench.config, workbench.config.federation
    folder.failure_file.unlink(missing_ok=True)  # of a submission before this one
    clients = federation.clients
    roster = Roster(grid=grid, clients=clients, workers=workers or clients, ttl=federation.round_deadline)
    with folder.failing():
        roster.wait(federation.join_deadline, federation.minimum_clients)
    transport = GridTransport(
        roster=roster,
        answers=RoundAnswers(folder.answers_folder),
        round_deadline=federation.round_deadline,
        rejoin_deadline=federation.rejoin_deadline,
        patience=ASK_SILENT_AGAIN if workers is None else math.inf,  # an engine in our own hands loses no message
    )
    run_server(config, folder, workbench, transport, (), progress)
