"""What tells two runs apart, and a run from the defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedlora.config import RunConfig
from fedlora.experiments.run_folder import to_json
from fedlora.experiments.runs.stored_run import StoredRun
from fedlora.experiments.terminal import shown_spent

_CODE = ("fedlora_version", "code_digest", "model_digest", "versions", "execution")
_RESULTS = ("metrics", "private_evaluation", "bytes_up", "bytes_down", "peak_memory_bytes")


class Difference(NamedTuple):
    """One thing, as two runs have it; None where one of them has no such thing."""

    name: str
    left: Any
    right: Any


def from_defaults(run: StoredRun) -> list[Difference]:
    """Settings of a run that are not the default, which is on the right."""
    return [pair for pair in _between(run.settings, RunConfig().to_mapping()) if pair.left is not None]  # old: fewer


def settings_apart(left: StoredRun, right: StoredRun) -> list[Difference]:
    """All but the folders that they were written to."""
    return [pair for pair in _between(left.settings, right.settings) if pair.name != "run.out"]


def code_apart(left: StoredRun, right: StoredRun) -> list[Difference]:
    """Version and code of fedlora, weights of the base model, versions of libraries, and what the machine ran."""
    return _between(_some(left, _CODE), _some(right, _CODE))


def results_apart(left: StoredRun, right: StoredRun) -> list[Difference]:
    """Spent ε, metrics, traffic and time, where they differ."""
    found = [
        {"status": run.status, "ε spent": _spent(run), **_some(run, _RESULTS), "seconds": run.seconds}
        for run in (left, right)
    ]
    return _between(*found)


def _spent(run: StoredRun) -> float | str | None:
    spent = run.epsilon_spent
    return spent if spent is None or run.status == "done" else shown_spent(spent, run.status)


def _some(run: StoredRun, names: Sequence[str]) -> dict[str, Any]:
    record = run.record or {}
    return {name: record[name] for name in names if name in record}


def _between(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Difference]:
    first, second = _flat(to_json(left)), _flat(to_json(right))
    pairs = [Difference(name, first.get(name), second.get(name)) for name in {**first, **second}]
    return [pair for pair in pairs if not _same(pair.left, pair.right)]


def _same(left: Any, right: Any) -> bool:
    both_nan = all(isinstance(value, float) and math.isnan(value) for value in (left, right))
    return both_nan or bool(left == right)


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by "section.key"."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
