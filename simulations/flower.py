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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedloraError
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
    """Do the rounds that `folder` lacks, the clients divided among `run.workers` nodes of Flower's engine.

    Args:
        cpus: of this machine, for all workers together; a Ray cluster that is there already knows its own.

    Raises:
        InputError: anything the user can correct, found before any process is started.
        BudgetRefused: the asked ε cannot be met; likewise.
        FedloraError: the run failed.
    """
    config = folder.read_config()
    _check_device(config)
    make_sites(config, load_simulated_data(config), make_schedule(config))
    outcome: list[BaseException | None] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, _: Context) -> None:
        from server.app import prepare, serve

        try:
            serve(grid, prepare(config), folder, progress, workers.number)
        except BaseException as error:  # Flower would log it and go on to an end that looks good
            outcome.append(error)
        else:
            outcome.append(None)

    with ray_engine(config, cpus) as workers:
        run_simulation(
            server_app=server_app,
            client_app=ConfiguredClientApp(config),
            num_supernodes=workers.number,
            backend_config=workers.backend_config,
        )
    if not outcome:
        raise FedloraError("Flower's engine ended before the run did; its own log above says why")
    if outcome[0] is not None:
        raise outcome[0]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What Ray may use of one machine."""

    cpus: int
    gpus: int = 0

    def holds(self, cpus: int, gpus: int) -> int:
        """How many actors that need so much each."""
        return min(self.cpus // cpus, self.gpus // gpus if gpus else self.cpus)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Among how many nodes of Flower's engine the clients are divided, and what does their work.

    A node's messages go to whichever actor is free; there are fewer actors than nodes where CPUs or GPUs are few.
    """

    number: int
    actors: int
    cpus: int
    """Of an actor: Ray gives it as many torch threads."""
    gpus: int
    """Of an actor: one or none; two actors on a GPU would only take turns."""

    @property
    def backend_config(self) -> dict[str, Any]:
        """What an actor gets, as Flower wants it."""
        return {"client_resources": {"num_cpus": self.cpus, "num_gpus": self.gpus}}

    @classmethod
    def on(cls, machines: Sequence[Machine], config: RunConfig) -> Workers:
        """As `run.workers` says; "auto" is one for each GPU, or for each CPU.

        Raises:
            ConfigError: there is no such device as the run wants.
        """
        gpus = 1 if config.run.device.startswith("cuda") else 0
        all_cpus = sum(machine.cpus for machine in machines)
        places = sum(machine.gpus for machine in machines) if gpus else all_cpus
        if not places:
            raise ConfigError(f"run.device = {config.run.device}, but Ray has no such device; choose another")
        asked = places if config.run.workers == "auto" else config.run.workers
        number = min(asked, config.federation.clients)
        actors = min(number, places)
        fitting = (
            cpus
            for cpus in range(all_cpus // actors, 1, -1)
            if sum(machine.holds(cpus, gpus) for machine in machines) >= actors
        )
        return cls(number=number, actors=actors, cpus=next(fitting, 1), gpus=gpus)


@contextmanager
def ray_engine(config: RunConfig, cpus: int) -> Iterator[Workers]:
    """Ray, on this machine or, where RAY_ADDRESS names one, the cluster that is there; yields what is to work on it.

    Flower uses a Ray that it finds running, and leaves it to us to wait with an interrupt until Ray's processes can be
    found and ended.
    """
    search_path = os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the actors import what this process does
    # Below /tmp, as Ray itself does: its sockets lie there, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="fedlora-ray-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        try:
            with _interrupts_deferred():
                said: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}  # why a client failed
                if os.environ.get("RAY_ADDRESS"):
                    ray.init(runtime_env={"env_vars": {"PYTHONPATH": search_path}}, **said)
                    workers = Workers.on(_cluster(), config)
                else:
                    workers = Workers.on([Machine(cpus=cpus, gpus=torch.cuda.device_count())], config)
                    ray.init(
                        address="local",
                        num_cpus=workers.actors * workers.cpus,
                        num_gpus=workers.actors * workers.gpus,
                        include_dashboard=False,
                        _temp_dir=scratch,
                        **said,
                    )
            yield workers
        finally:
            ray.shutdown()


def _cluster() -> list[Machine]:
    offered = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Machine(cpus=int(one.get("CPU", 0)), gpus=int(one.get("GPU", 0))) for one in offered]


def _check_device(config: RunConfig) -> None:
    """Every worker sees one GPU, its own, under the name "cuda"."""
    if config.run.device.startswith("cuda:"):
        raise ConfigError(
            f"run.device = {config.run.device}, but under Flower every worker gets a GPU of its own; set "
            "run.device=cuda, and CUDA_VISIBLE_DEVICES to those that may be used"
        )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m simulations.flower", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run_dir", type=Path, help="folder with config.toml")
    parser.add_argument("--cpus", type=int, default=torch.get_num_threads(), help="CPUs for the workers")
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
