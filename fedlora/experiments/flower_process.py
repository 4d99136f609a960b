"""`--transport flower`: the same run in a process of its own, where Flower's engine drives the real apps.

fedlora never imports Flower. The apps live in the checkout, so this works from one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import fedlora
from fedlora.config import RunConfig
from fedlora.errors import FedloraError, InputError
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import resolve
from fedlora.federation.schedule import make_schedule
from fedlora.federation.sites import load_simulated_data, make_sites

CHECKOUT = Path(fedlora.__file__).parent.parent


class FlowerRunFailed(FedloraError):
    """The run failed under Flower and said why on standard error; carries its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def simulate_under_flower(config: RunConfig) -> Path:
    """Run `config` under Flower's simulation engine; everything is checked before the run folder is made.

    Returns:
        The run folder.

    Raises:
        InputError: anything the user can correct, or this is no checkout; nothing was written.
        FlowerRunFailed: the run failed.
    """
    _require_checkout()
    RunFolder.check_free(config)
    config = resolve(config)
    make_sites(config, load_simulated_data(config), make_schedule(config))
    return run_under_flower(RunFolder.create(config).path)


def run_under_flower(folder: Path) -> Path:
    """Do the rounds that `folder` lacks; see `simulate_under_flower`."""
    _require_checkout()
    RunFolder.open(folder)
    # -P: relative paths of the config hold, and yet no package in the user's folder is taken for ours.
    command = [sys.executable, "-P", "-m", "simulations.flower", str(folder.absolute())]
    search_path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": search_path}
    process = subprocess.Popen(command, env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # a terminal has told it already, and once is all it listens to
        code = process.wait()  # it ends its engine before it goes
    if code:
        raise FlowerRunFailed("the run under Flower did not finish; its last line above says why", code)
    return folder


def _require_checkout() -> None:
    if not (CHECKOUT / "simulations" / "flower.py").is_file():
        raise InputError(
            f"--transport flower needs fedlora's checkout (clients/, server/ and simulations/ beside {CHECKOUT}); "
            "clone it and run there, or leave the transport at cohort"
        )
    if find_spec("flwr") is None or find_spec("ray") is None:
        raise InputError("--transport flower needs Flower's engine; install the extra: pip install 'fedlora[flower]'")
