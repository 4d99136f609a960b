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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from fedlora.config import RunConfig
from fedlora.errors import FedloraError
from fedlora.experiments.progress import TerminalProgress
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import Progress
from fedlora.federation.schedule import make_schedule
from fedlora.federation.sites import load_simulated_data, make_sites
from server.superlink import QUIET

# Nothing here calls home. Read when flwr and ray are imported, in this process and in theirs.
os.environ |= {**QUIET, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")

import ray
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
        from server.app import prepare, serve

        try:
            serve(grid, prepare(config), folder, progress)
        except BaseException as error:  # Flower would log it and go on to an end that looks good
            outcome.append(error)
        else:
            outcome.append(None)

    with ray_engine(config, cpus) as client_resources:
        run_simulation(
            server_app=server_app,
            client_app=ConfiguredClientApp(config),
            num_supernodes=config.federation.clients,
            backend_config={"client_resources": client_resources},
        )
    if not outcome:
        raise FedloraError("Flower's engine ended before the run did; its own log above says why")
    if outcome[0] is not None:
        raise outcome[0]


@contextmanager
def ray_engine(config: RunConfig, cpus: int) -> Iterator[dict[str, Any]]:
    """Ray, with as many actors as clients and CPUs allow; yields the resources of one actor.

    Ray gives an actor as many torch threads as CPUs. A GPU has one actor: two would only take turns. Flower uses a Ray
    that it finds running, and leaves it to us to wait with an interrupt until Ray's processes can be found and ended.
    """
    gpus = torch.cuda.device_count() if config.run.device.startswith("cuda") else 0
    actors = min(config.federation.clients, gpus or cpus)
    threads = max(1, cpus // actors)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the actors import the same code as this process
    # Below /tmp, as Ray itself does: its sockets lie there, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="fedlora-ray-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        try:
            with _interrupts_deferred():
                ray.init(
                    num_cpus=actors * threads,
                    num_gpus=gpus,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=True,  # a client's log is the only place that says why it failed
                    _temp_dir=scratch,
                )
            yield {"num_cpus": threads, "num_gpus": 1 if gpus else 0}
        finally:
            ray.shutdown()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m simulations.flower", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run_dir", type=Path, help="folder with config.toml")
    parser.add_argument("--cpus", type=int, default=torch.get_num_threads(), help="CPUs for the clients")
    chosen = parser.parse_args(arguments)
    if chosen.cpus < 1:
        parser.error(f"--cpus {chosen.cpus}, wanted at least 1")
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        with TerminalProgress() as progress:
            simulate(RunFolder.open(chosen.run_dir.absolute()), progress, chosen.cpus)
    except FedloraError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"fedlora: interrupted; fedlora simulate --resume {chosen.run_dir} goes on", file=sys.stderr)
        return 130
    return 0


def _interrupt(_: int, __: Any) -> NoReturn:
    """Once is enough: a second Ctrl-C, or one that our caller passes on, must not break the clean-up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    logging.disable()  # what fails from now on fails because of this
    raise KeyboardInterrupt


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    caught: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        for number in SIGNALS:  # Ray has put its own in place of one
            signal.signal(number, _interrupt)
    if caught:
        _interrupt(caught[0], None)


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
