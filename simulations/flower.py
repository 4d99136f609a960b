"""A run under Flower's simulation engine: `python -m simulations.flower RUN_DIR`, from a checkout.

RUN_DIR holds config.toml (`fedlora simulate --transport flower` makes it); the unmodified server.app and clients.app
write into it what every run leaves behind. A run that was interrupted goes on where it stopped.

Exit codes are those of `fedlora`, which Flower's own command cannot be trusted with: 0 done, 1 failed run, 2 bad input,
3 budget refused, 130 interrupted. Flower's and Ray's processes are gone when this one ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from fedlora.config import RunConfig
from fedlora.errors import FedloraError
from fedlora.experiments.progress import TerminalProgress
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import Progress
from fedlora.federation.schedule import make_schedule
from fedlora.federation.workbench import load_simulated_data, make_sites

# Nothing here calls home. Read when flwr and ray are imported, in this process and in theirs.
os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")

import ray
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation


class ConfiguredClientApp(ClientApp):
    """clients.app with a run_config, which `run_simulation` has no way to give it. Ray carries it to its actors."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self._run_config = config.to_flower()

    def __call__(self, message: Message, context: Context) -> Message:
        from clients.app import app

        return app(message, dataclasses.replace(context, run_config=self._run_config))  # the state stays the node's own


def simulate(folder: RunFolder, progress: Progress, cpus: int) -> None:
    """Do the rounds that `folder` lacks, with one Flower node for each client.

    Raises:
        InputError: anything the user can correct, found before any process is started.
        BudgetRefused: the asked ε cannot be met; likewise.
        FedloraError: the run failed.
    """
    config = folder.read_config()
    make_sites(config, load_simulated_data(config), make_schedule(config))
    outcome: list[BaseException | None] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, _: Context) -> None:
        from server.app import serve

        try:
            serve(grid, config, folder, progress)
        except BaseException as error:  # Flower would log it and go on to an end that looks good
            outcome.append(error)
        else:
            outcome.append(None)

    # Below /tmp, as Ray itself does: its sockets lie there, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="fedlora-ray-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        try:
            run_simulation(
                server_app=server_app,
                client_app=ConfiguredClientApp(config),
                num_supernodes=config.federation.clients,
                backend_config=backend_config(config, cpus, scratch),
            )
        finally:
            ray.shutdown()
    if not outcome:
        raise FedloraError("Flower's engine ended before the run did; its own log above says why")
    if outcome[0] is not None:
        raise outcome[0]


def backend_config(config: RunConfig, cpus: int, scratch: str) -> dict[str, dict[str, Any]]:
    """As many actors as clients and CPUs allow, sharing the CPUs out without a rest of threads that fight for them.

    Ray gives every actor as many torch threads as CPUs. On GPUs there is one actor on each: two would only take turns.
    """
    gpus = torch.cuda.device_count() if config.run.device.startswith("cuda") else 0
    actors = min(config.federation.clients, gpus or cpus)
    threads = max(1, cpus // actors)
    return {
        "init_args": {
            "num_cpus": actors * threads,
            "num_gpus": gpus,
            "include_dashboard": False,
            "logging_level": logging.ERROR,
            "log_to_driver": True,  # the clients' logs are the only place that says why one failed
            "_temp_dir": scratch,
        },
        "client_resources": {"num_cpus": threads, "num_gpus": 1 if gpus else 0},
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m simulations.flower", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run_dir", type=Path, help="folder with config.toml")
    parser.add_argument("--cpus", type=int, default=torch.get_num_threads(), help="CPUs for the clients")
    chosen = parser.parse_args(arguments)
    if chosen.cpus < 1:
        parser.error(f"--cpus {chosen.cpus}, wanted at least 1")
    signal.signal(signal.SIGINT, _interrupt)
    try:
        with TerminalProgress() as progress:
            simulate(RunFolder.open(chosen.run_dir.absolute()), progress, chosen.cpus)
    except FedloraError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM into the latter
        print(f"fedlora: interrupted; fedlora simulate --resume {chosen.run_dir} goes on", file=sys.stderr)
        return 130
    return 0


def _interrupt(_: int, __: Any) -> NoReturn:
    """Once is enough: a second Ctrl-C, or one that our caller passes on, must not break the clean-up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def leave(code: int) -> NoReturn:
    """End now. After an interrupt Flower's server thread still waits for replies, and Python would wait for it.

    Ray is shut down by then, and every file of the run folder is written whole or not at all.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    code = 1
    try:
        code = main(sys.argv[1:])
    except Exception:
        logging.getLogger("fedlora").exception("the run failed")
    leave(code)
