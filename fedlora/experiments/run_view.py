"""What a run's folder tells of it while it runs, by whatever transport and in whatever process. No torch.

Files may be half written, damaged or gone the next moment, and a deployed run's hold names and codes that came over a
network: nothing here raises, what is not understood is not known, and whoever shows a text makes one line of it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors import SafetensorError, safe_open

from fedlora.config import RunConfig
from fedlora.errors import FedloraError
from fedlora.experiments.run_folder import RunFolder
from fedlora.federation.schedule import ScheduledRound, make_schedule

State = Literal["running", "done", "failed", "left"]
Standing = Literal["answered", "waiting", "not asked", ""]

_UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, SafetensorError,
    FedloraError,
)  # fmt: skip
_ANSWER = re.compile(r"(\d{1,9})-(\d{1,9})\.safetensors")
_RECENT = 10
"""Rounds whose duration says how long the next ones take."""

Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True)
class RoundLine:
    """One line of rounds.jsonl."""

    index: int
    phase: str
    metrics: Mapping[str, float]
    seconds: float
    epsilon_max: float | None
    failures: Mapping[int, str]


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run as its folder shows it at one moment."""

    path: Path
    state: State
    """left: nobody is at work on it, and yet it has not ended."""
    config: RunConfig | None
    schedule: tuple[ScheduledRound, ...] = ()
    rounds: tuple[RoundLine, ...] = ()
    asked: int = -1
    """Index of the round that was asked for last."""
    waited: float = 0.0
    """Seconds since it was."""
    answered: frozenset[int] = frozenset()
    """Clients whose answers to it are at hand."""
    epsilons: Mapping[int, float] = field(default_factory=dict)
    """What each client has spent so far."""
    reason: str = ""
    """Why it failed, as its folder says."""
    under_policy: bool = False

    @property
    def under_way(self) -> ScheduledRound | None:
        """The round that is being done, as far as is known."""
        open_round = self.state == "running" and self.asked > max((line.index for line in self.rounds), default=-1)
        return self.schedule[self.asked] if open_round and self.asked < len(self.schedule) else None

    @property
    def done(self) -> int:
        """Rounds that are over, those included that were given up."""
        last = max((line.index + 1 for line in self.rounds), default=0)
        return len(self.schedule) if self.state == "done" else min(last, len(self.schedule) or last)

    @property
    def seconds_left(self) -> float | None:
        """As long as the last rounds took, for each that is to come; None before there is one."""
        known = [line.seconds for line in self.rounds[-_RECENT:]]
        if not known or self.state != "running":
            return None
        waited = self.waited if self.under_way else 0.0
        return max(0.0, sum(known) / len(known) * (len(self.schedule) - self.done) - waited)

    @property
    def metric(self) -> tuple[str, list[float]]:
        """Name and values so far of the headline metric."""
        name = next((name for line in self.rounds for name in line.metrics), "")
        return name, [line.metrics[name] for line in self.rounds if name in line.metrics]

    def standing(self, client: int) -> Standing:
        """How `client` stands in the round under way."""
        entry = self.under_way
        if entry is None:
            return ""
        return "not asked" if client not in entry.clients else "answered" if client in self.answered else "waiting"

    def last_answered(self, client: int) -> int | None:
        """The last whole round that `client` answered usably."""
        asked = {entry.index: entry.clients for entry in self.schedule}
        found = (
            line.index
            for line in reversed(self.rounds)
            if client in asked.get(line.index, ()) and client not in line.failures
        )
        return next(found, None)

    def failures(self, client: int) -> Counter[str]:
        return Counter(line.failures[client] for line in self.rounds if client in line.failures)


def read_run(path: Path, *, now: float) -> RunView:
    """What the run in `path` shows at the moment.

    Args:
        path: of its folder.
        now: seconds since the epoch.
    """
    folder = RunFolder(path)
    config = _tried(folder.read_config, None)
    record = _tried(lambda: _mapping(json.loads(folder.record_file.read_text(encoding="utf-8"))), None)
    reason = _tried(lambda: folder.failure_file.read_text(encoding="utf-8", errors="replace").strip(), "")
    asked = folder.last_asked()
    rounds = tuple(_round_lines(folder))
    return RunView(
        path=path,
        state=_state(folder),
        config=config,
        schedule=() if config is None else _tried(lambda: make_schedule(config), ()),
        rounds=rounds,
        asked=asked,
        waited=_tried(lambda: max(0.0, now - folder.asked_file.stat().st_mtime), 0.0),
        answered=frozenset(_answered(folder, asked)),
        epsilons=_epsilons_of(_clients(record) if record is not None else _checkpointed(folder)),
        reason=reason,
        under_policy=asked >= 0 and not folder.ledger_file.exists(),
    )


def _state(folder: RunFolder) -> State:
    if folder.record_file.exists():
        return "done"
    if folder.failure_file.exists():  # it goes when somebody goes on with the run
        return "failed"
    return "running" if folder.is_claimed() else "left"


def _tried(read: Callable[[], Read], otherwise: Read) -> Read:
    try:
        return read()
    except _UNREADABLE:
        return otherwise


def _round_lines(folder: RunFolder) -> Iterator[RoundLine]:
    """Whole lines up to the first that is none, each round once."""
    seen: set[int] = set()
    for line in _tried(folder.read_rounds, list[Any]()):
        found = _tried(lambda line=line: _round_line(line), None)  # type: ignore[misc]
        if found is None:
            return
        if found.index not in seen:
            seen.add(found.index)
            yield found


def _round_line(line: Any) -> RoundLine:
    index = line["round"]
    if type(index) is not int or index < 0:
        raise ValueError(index)
    metrics = {str(name): _number(value) for name, value in (line.get("metrics") or {}).items()}
    seconds = line.get("seconds")
    return RoundLine(
        index=index,
        phase=str(line.get("phase", "")),
        metrics={name: value for name, value in metrics.items() if value is not None and math.isfinite(value)},
        seconds=max(0.0, _number(seconds) or 0.0),
        epsilon_max=_number(line.get("epsilon_max")),
        failures={int(client): str(code) for client, code in (line.get("failures") or {}).items()},
    )


def _number(value: Any) -> float | None:
    """As `to_json` writes one: infinity is a text."""
    known = value == "inf" or (isinstance(value, int | float) and not isinstance(value, bool))
    return None if not known or math.isnan(value := float(value)) else value


def _answered(folder: RunFolder, asked: int) -> Iterator[int]:
    for name in _tried(lambda: [path.name for path in folder.answers_folder.iterdir()], list[str]()):
        found = _ANSWER.fullmatch(name)
        if found and int(found[1]) == asked:
            yield int(found[2])


def _checkpointed(folder: RunFolder) -> list[Any]:
    """What each client said of itself up to the last whole round. Reads the checkpoint's header, and no tensor."""

    def read() -> list[Any]:
        with safe_open(folder.checkpoint_file, framework="numpy") as file:
            return list(_mapping(json.loads(file.metadata()["state"])["facts"]).values())

    return _tried(read, list[Any]())


def _clients(record: Mapping[str, Any]) -> list[Any]:
    clients = record.get("clients")
    return clients if isinstance(clients, list) else []


def _epsilons_of(clients: list[Any]) -> dict[int, float]:
    found: dict[int, float] = {}
    for facts in clients:
        with suppress(*_UNREADABLE):
            client, epsilon = facts["client"], _number(facts["epsilon"])
            if type(client) is int and epsilon is not None:
                found[client] = epsilon
    return found


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError
    return value
