"""MLflow: to the server that MLFLOW_TRACKING_URI names, or else into a local file that `mlflow ui` shows.

The experiment is MLFLOW_EXPERIMENT_NAME, or "fedlora". MLflow's client adds the user's name, host and git commit to a
run only where its fluent functions start it; this asks its client class, and sends what is written here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before it is imported: nothing here calls home
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a run does not wait minutes for a server that is down
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from fedlora.config import RunConfig
from fedlora.experiments.record import guarantee_of
from fedlora.experiments.trackers.tracker import earlier_run, numbers_of, remember_run

if TYPE_CHECKING:
    from fedlora.federation.server import RoundReport

_MOST_CHARACTERS = 500  # of a parameter on every server
_MOST_PARAMETERS = 100  # in one request


class MLflow:
    """Settings as parameters, rounds as metrics, the record as a file. A resumed run goes on in the same MLflow run."""

    name = "mlflow"

    def start(self, config: RunConfig, folder: Path, *, first_round: int) -> None:
        self._client = MlflowClient()
        earlier = earlier_run(folder, self.name)
        if earlier is not None:
            self._run = earlier
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(self._experiment(), run_name=folder.name).info.run_id
        remember_run(folder, self.name, self._run)
        settings = [Param(key, str(value)[:_MOST_CHARACTERS]) for key, value in config.to_flower().items()]
        for begin in range(0, len(settings), _MOST_PARAMETERS):
            self._client.log_batch(self._run, params=settings[begin : begin + _MOST_PARAMETERS])

    def round(self, report: RoundReport) -> None:
        self._log(numbers_of(report), step=report.round)

    def finish(self, record: Mapping[str, Any]) -> None:
        guarantee = guarantee_of(record)
        self._client.set_tag(self._run, "guarantee", str(guarantee))
        if not guarantee.flaws:
            self._client.set_tag(self._run, "not covered", guarantee.not_covered)
        self._client.log_dict(self._run, dict(record), "record.json")

    def close(self, *, whole: bool) -> None:
        self._client.set_terminated(self._run, status="FINISHED" if whole else "KILLED")

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedlora")
        known = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if known is None else known.experiment_id)

    def _log(self, numbers: Mapping[str, float], *, step: int) -> None:
        now = time.time_ns() // 1_000_000
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])
