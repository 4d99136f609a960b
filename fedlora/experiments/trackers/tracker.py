"""What a tracker is, and how a run is shown to several of them without depending on any."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from fedlora.experiments.run_folder import replace_file

if TYPE_CHECKING:
    from fedlora.config import RunConfig
    from fedlora.experiments.simulate import Progress
    from fedlora.federation.server import RoundReport


class Tracker(Protocol):
    """One tracker of one run. Whatever it raises is said once, and it is asked for nothing more."""

    @property
    def name(self) -> str:
        """As given with --track."""
        ...

    def start(self, config: RunConfig, folder: Path, *, first_round: int) -> None:
        """Begin, or go on with what was tracked of the run in `folder` before.

        Args:
            first_round: the next one; not 0 where the run is resumed.
        """
        ...

    def round(self, report: RoundReport) -> None: ...

    def finish(self, record: Mapping[str, Any]) -> None:
        """The run has ended well; `record` is its record.json."""
        ...

    def close(self, *, whole: bool) -> None:
        """Always the last call after a start; a run that is not `whole` failed, or was stopped and can go on."""
        ...


class Tracked:
    """A `Progress` that shows a run to `progress` and then to trackers.

    A tracker whose server is down or whose disk is full is said once and left out from then on: it never stops a run.
    """

    def __init__(self, progress: Progress, trackers: Sequence[Tracker], warn: Callable[[str], None]) -> None:
        self._progress, self._waiting, self._warn = progress, trackers, warn
        self._running: list[Tracker] = []
        self._whole = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._tell(lambda tracker: tracker.close(whole=self._whole))

    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None:
        self._progress.start(config, folder=folder, metric=metric, num_rounds=num_rounds, done=done)
        self._running = list(self._waiting)
        self._tell(lambda tracker: tracker.start(config, folder, first_round=done))

    def round(self, report: RoundReport) -> None:
        self._progress.round(report)
        self._tell(lambda tracker: tracker.round(report))

    def finish(self, record: Mapping[str, Any]) -> None:
        self._progress.finish(record)
        self._whole = True
        self._tell(lambda tracker: tracker.finish(record))

    def _tell(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._running):
            try:
                tell(tracker)
            except Exception as error:  # theirs to raise what they like
                self._running.remove(tracker)
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self._warn(f"{tracker.name} cannot be told of this run any more and is left out ({reason[:300]})")


def numbers_of(report: RoundReport) -> dict[str, float]:
    """What can be plotted of a round, by the names of rounds.jsonl; infinity cannot."""
    numbers = {
        "epsilon_max": report.epsilon_max,
        "bytes_up": report.bytes_up,
        "bytes_down": report.bytes_down,
        "seconds": report.seconds,
        "clients_ok": report.clients_ok,
        "clients_failed": report.clients_failed,
        **report.metrics,
    }
    if report.private_evaluation is not None:
        found = dataclasses.asdict(report.private_evaluation)
        numbers |= {f"private_{name}": found[name] for name in ("accuracy", "standard_error")}
    return {name: float(value) for name, value in numbers.items() if value is not None and math.isfinite(value)}


def earlier_run(folder: Path, tracker: str) -> str | None:
    """The tracker's own id of the run in `folder`, so that a resumed run goes on in it; None where it is new."""
    known = _ids(folder).get(tracker)
    return known if isinstance(known, str) else None


def remember_run(folder: Path, tracker: str, run_id: str) -> None:
    """See `earlier_run`."""
    replace_file(folder / "trackers.json", (json.dumps({**_ids(folder), tracker: run_id}) + "\n").encode())


def _ids(folder: Path) -> dict[str, Any]:
    try:
        known = json.loads((folder / "trackers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
