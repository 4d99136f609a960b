from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlora.experiments.runs.store import FILE_NAME, Store
from fedlora.experiments.runs.stored_run import StoredRun

Recorded = Callable[..., dict[str, Any]]
Stored = Callable[..., StoredRun]
Folder = Callable[[Sequence[StoredRun]], Path]


@pytest.fixture
def recorded() -> Recorded:
    """A record with what the report reads, and no more."""

    def make(
        value: float = 0.8, *, epsilon: float | str = 6.0, spent: float | None = None, **more: Any
    ) -> dict[str, Any]:
        shown = "inf" if epsilon == "inf" else 0.9994 * float(epsilon) if spent is None else spent
        guarantee = {"epsilon": shown, "delta": 1e-5, "accountant": "pld", "unit": "record", "relation": "add/remove"}
        record = {
            "code_digest": "c" * 64,
            "config": {
                "privacy": {"epsilon": epsilon},
                "adapter": {"method": "ffa"},
                "data": {"task": "sst2"},
                "run": {"seed": 0},
            },
            "metric": {"name": "accuracy", "value": value, "split": "validation"},
            "privacy": {"guarantee": guarantee, "sites": [{"epsilon_charged": shown}]},
            "clients": [{"effective_noise_multiplier": 0.7}, {"effective_noise_multiplier": 0.6}],
            "bytes_up": 2_000_000,
            "wall_seconds": 61.2,
            "noise_seeded": False,
            "selection": None,
        }
        return record | more

    return make


@pytest.fixture
def stored(recorded: Recorded) -> Stored:
    """A cell of a sweep over task, method, ε and seed."""

    def make(
        value: float = 0.8, *, method: str = "plain", epsilon: float | str = 6.0, seed: int = 0, **more: Any
    ) -> StoredRun:
        axes = {
            "task": more.pop("task", "sst2"),
            "method": method,
            "privacy.epsilon": str(epsilon),
            "run.seed": str(seed),
        }
        name = "-".join(axes.values())
        rounds = more.pop("rounds", [{"round": 1, "metric": value - 0.1}, {"round": 2, "metric": value}])
        folder = more.pop("folder", f"cells/{name}")
        record = recorded(value, epsilon=epsilon, **more)
        return StoredRun(folder=folder, digest=f"{name:x<16}", role="cell", axes=axes, record=record, rounds=rounds)

    return make


@pytest.fixture
def folder_of(tmp_path: Path) -> Folder:
    """A folder with a store of these runs."""

    def make(runs: Sequence[StoredRun]) -> Path:
        folder = tmp_path / "sweep"
        folder.mkdir(exist_ok=True)
        with Store.create(folder) as store:
            store.put(*(dataclasses.replace(run, record=None) for run in runs))
        with contextlib.closing(sqlite3.connect(folder / FILE_NAME)) as connection, connection:
            for run in runs:  # past the store, which old and corrupt records never met
                record = None if run.record is None else json.dumps(run.record)
                connection.execute("UPDATE runs SET record = ? WHERE folder = ?", (record, run.folder))
        return folder

    return make


@pytest.fixture
def sweep_runs(stored: Stored) -> list[StoredRun]:
    """Two methods, three ε, three seeds; "gated" is better by 0.03, give or take, at every private ε."""
    wobble = (-0.004, 0.001, 0.003)
    return [
        stored(
            base + (0.03 + wobble[(seed + 1) % 3] / 4 if method == "gated" and epsilon != "inf" else 0) + wobble[seed],
            method=method,
            epsilon=epsilon,
            seed=seed,
        )
        for epsilon, base in ((1.0, 0.70), (6.0, 0.80), ("inf", 0.90))
        for method in ("plain", "gated")
        for seed in range(3)
    ]
