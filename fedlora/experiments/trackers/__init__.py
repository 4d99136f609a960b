"""Trackers: the rounds of a run where a team looks at all its runs, beside the run folder that stays the account.

Every tracker sees the same public facts and nothing else: the settings, what rounds.jsonl holds of a round, and the
record. Paths in the settings are among them; MLflow and W&B send all of it to the server that the user named.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.errors import InputError
from fedlora.experiments.trackers.tracker import Tracker
from fedlora.schema import require_known

TRACKERS = ("tensorboard", "mlflow", "wandb")


def open_trackers(names: Sequence[str]) -> list[Tracker]:
    """Trackers by name, each once; none of them has written or sent anything yet.

    Raises:
        ConfigError: a name is not known.
        InputError: a tracker's package is not installed; names the extra.
    """
    for name in names:
        require_known(name, TRACKERS, "tracker", f"--track {name}")
    return [_open(name) for name in dict.fromkeys(names)]


def _open(name: str) -> Tracker:
    try:
        if name == "tensorboard":
            from fedlora.experiments.trackers.tensorboard import TensorBoard

            return TensorBoard()
        if name == "mlflow":
            from fedlora.experiments.trackers.mlflow import MLflow

            return MLflow()
        from fedlora.experiments.trackers.wandb import WeightsAndBiases

        return WeightsAndBiases()
    except ImportError as error:
        raise InputError(
            f"--track {name} needs a package that cannot be imported ({error}); "
            f"install the extra: pip install 'fedlora[{name}]'"
        ) from error
