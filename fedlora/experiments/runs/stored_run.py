"""One run as a store keeps it: made from its folder, or from a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """One run as it is kept.

    Attributes:
        folder: of the run, relative to the store's own; what the run is called.
        digest: of the config that was asked for, `RunConfig.digest`.
        role: a cell of a sweep, a trial for its settings, or a run by itself.
        axes: label by axis of the sweep, in its order.
        error: why it failed, in one line; empty where it did not.
        record: record.json; None where the run has not ended well.
        rounds: lines of rounds.jsonl.
        config: as asked, `RunConfig.to_mapping`, so that a run without a record can be told from others.
        stamp: changes with record.json; empty where the run did not come from a folder.
    """

    folder: str
    digest: str
    role: Literal["cell", "trial", "run"] = "run"
    axes: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    record: Mapping[str, Any] | None = None
    rounds: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] | None = None
    stamp: str = ""

    @property
    def status(self) -> Literal["done", "failed", "unfinished"]:
        return "failed" if self.error else "unfinished" if self.record is None else "done"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of the run, by section and key; the record's where there is one."""
        found: Mapping[str, Any] = self.config or {} if self.record is None else self.record["config"]
        return found

    @property
    def name(self) -> str:
        """The last part of its folder, or all of it for a run by itself."""
        return self.folder.rpartition("/")[2] if self.role != "run" else self.folder

    @property
    def epsilon_spent(self) -> float | None:
        """The largest ε of any site, rounds that were charged twice among it.

        Without a record no more than a lower bound, that of the rounds that are done: only the ledger knows of rounds
        that died, and they are charged.
        """
        if self.record is None:
            return max((float(line["epsilon_max"]) for line in self.rounds if "epsilon_max" in line), default=None)
        privacy = self.record.get("privacy", {})  # not in old records
        stated = [facts["epsilon"] for facts in (*self.record["clients"], privacy.get("guarantee", {"epsilon": 0}))]
        charged = [site["epsilon_charged"] for site in privacy.get("sites", ()) if "epsilon_charged" in site]
        return max(map(float, (*stated, *charged)))

    @property
    def private(self) -> bool | None:
        """Whether ε promises anything; None where nothing was spent yet."""
        spent, seeded = self.epsilon_spent, self.settings.get("privacy", {}).get("seeded_noise", False)
        return None if spent is None else math.isfinite(spent) and not seeded

    @property
    def seconds(self) -> float | None:
        """How long it ran; so far, where it has not ended."""
        if self.record is not None:
            return float(self.record["wall_seconds"])
        return sum(line.get("seconds", 0.0) for line in self.rounds) if self.rounds else None
