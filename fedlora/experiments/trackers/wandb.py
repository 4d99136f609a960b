"""Weights & Biases: offline in the run folder unless WANDB_MODE says online; `wandb sync` sends it later.

WANDB_PROJECT and WANDB_ENTITY are obeyed; the project is "fedlora" without one. What W&B would collect by itself (host,
user, git, code, installed packages, console, load of the machine) is switched off.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # before it is imported: nothing here calls home

import wandb

from fedlora.config import RunConfig
from fedlora.experiments.record import guarantee_of
from fedlora.experiments.trackers.tracker import earlier_run, numbers_of, remember_run

if TYPE_CHECKING:
    from fedlora.federation.server import RoundReport


class WeightsAndBiases:
    """Settings as config, rounds as history, result and guarantee as summary.

    A resumed run goes on under the same id; offline that is a second folder of this id beside the first.
    """

    name = "wandb"

    def start(self, config: RunConfig, folder: Path, *, first_round: int) -> None:
        earlier = earlier_run(folder, self.name)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedlora"),
            dir=str(folder),
            id=earlier,
            resume=None if earlier is None else "allow",
            name=folder.name,
            config=config.to_flower(),
            mode=os.environ.get("WANDB_MODE", "offline"),
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                init_timeout=30,  # a run does not wait longer for a server that is down
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        remember_run(folder, self.name, self._run.id)

    def round(self, report: RoundReport) -> None:
        self._run.log(numbers_of(report), step=report.round)

    def finish(self, record: Mapping[str, Any]) -> None:
        guarantee, metric = guarantee_of(record), record["metric"]
        self._run.summary.update(
            {
                metric["name"]: metric["value"],
                "guarantee": str(guarantee),
                "not_covered": "" if guarantee.flaws else guarantee.not_covered,
                "wall_seconds": record["wall_seconds"],
                "config_digest": record["config_digest"],
            }
        )

    def close(self, *, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)
