"""The cells of a sweep on a Ray cluster. The only file of fedlora that imports Ray.

Every machine needs fedlora, the data and the base model, and must see the sweep's folder at the same path.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Self

from fedlora.errors import ConfigError
from fedlora.experiments.sweeps.worker import Job, Worker

_PATIENCE = 5.0  # seconds
_worker: Worker | None = None  # of a Ray process, which does many jobs and keeps what they share


class RayWorkers:
    """Tasks of a Ray cluster, which decides where each of them runs."""

    def __init__(self, address: str, *, threads: int = 1, accelerators: float = 0) -> None:
        """Connect.

        Args:
            address: "host:port" of a cluster, "auto" for the one that this machine is part of, "local" for a new one
                of this machine alone.
            threads: CPUs that a cell takes.
            accelerators: GPUs that a cell takes, or a share of one.

        Raises:
            ConfigError: Ray is not installed, or there is no cluster at that address.
        """
        if find_spec("ray") is None:
            raise ConfigError("--ray needs Ray; install the extra: pip install 'fedlora[ray]', or leave --ray out")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        _check_answers(address)
        import ray

        self._ray = ray
        threads_of_torch = {"env_vars": {"OMP_NUM_THREADS": str(threads)}}
        try:
            ray.init(address=address, runtime_env=threads_of_torch, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = " ".join(str(error).split())
            raise ConfigError(f"--ray {address}: no cluster answers ({first}); start one with `ray start`") from error
        self._run = ray.remote(_run_job).options(num_cpus=threads, num_gpus=accelerators, max_retries=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str] | None]:
        """As `Workers.run`."""
        running: dict[Any, Job] = {self._run.remote(job): job for job in jobs}
        while running:
            ended, _ = self._ray.wait(list(running), num_returns=1, timeout=1)
            for task in ended:
                yield running.pop(task), self._answer(task)
            if not ended:
                yield None

    def _answer(self, task: Any) -> str:
        try:
            error: str = self._ray.get(task)
        except self._ray.exceptions.RayError as failure:
            return f"Ray could not run it ({type(failure).__name__}); its own logs say why"
        return error


def _check_answers(address: str) -> None:
    """Ray itself waits for a cluster without end.

    Raises:
        ConfigError: nobody listens there.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"--ray {address}: nobody answers there ({error}); start a cluster with `ray start`"
        ) from error


def _run_job(job: Job) -> str:
    global _worker
    _worker = _worker or Worker()
    return _worker.run(job)
