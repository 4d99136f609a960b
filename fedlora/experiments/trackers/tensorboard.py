"""TensorBoard: event files in the run folder, for `tensorboard --logdir runs`. Nothing leaves the machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter

from fedlora.config import RunConfig
from fedlora.experiments.record import guarantee_of
from fedlora.experiments.trackers.tracker import numbers_of

if TYPE_CHECKING:
    from fedlora.federation.server import RoundReport


class TensorBoard:
    """Scalars by round, settings and guarantee as texts. A resumed run goes on in the same folder."""

    name = "tensorboard"

    def start(self, config: RunConfig, folder: Path, *, first_round: int) -> None:
        again = first_round or None  # rounds from here on that a killed process left are hidden
        self._writer = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=again, flush_secs=10)
        rows = "\n".join(f"| {key} | {value} |" for key, value in config.to_flower().items())
        self._writer.add_text("settings", f"| key | value |\n|---|---|\n{rows}", first_round)
        self._writer.flush()

    def round(self, report: RoundReport) -> None:
        for name, value in numbers_of(report).items():
            self._writer.add_scalar(name, value, report.round)
        if report.choice:
            self._writer.add_text("choice", report.choice, report.round)
        self._writer.flush()

    def finish(self, record: Mapping[str, Any]) -> None:
        guarantee = guarantee_of(record)
        self._writer.add_text("guarantee", str(guarantee))
        if not guarantee.flaws:
            self._writer.add_text("not covered", guarantee.not_covered)

    def close(self, *, whole: bool) -> None:
        self._writer.close()
