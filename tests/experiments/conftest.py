from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from fedlora.config import RunConfig
from fedlora.experiments.run_folder import RunFolder, to_json

mpl.use("Agg")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they were when they were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def watched(self: Figure, *arguments: Any, **how: Any) -> None:
        figures.append(self)
        save(self, *arguments, **how)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures


@pytest.fixture(scope="session")
def make_record() -> Callable[..., dict[str, Any]]:
    """`make_record("section.key=value", …, value=0.8)` is what record.json holds of such a run; nothing was trained."""

    def make(*overrides: str, value: float = 0.8, epsilon: float | None = None) -> dict[str, Any]:
        config = RunConfig().with_overrides(*overrides)
        spent = config.privacy.epsilon - 0.0004 if epsilon is None else epsilon
        seeded = config.privacy.seeded_noise
        phase = {
            "name": "finetune",
            "mechanism": "gaussian",
            "sampling_probability": 0.05,
            "effective_noise_multiplier": 0.75,
            "sensitivity": 1.0,
            "num_steps": 100,
        }
        facts = {"num_examples": 2000, "delta": 1e-5, "epsilon": spent, "accountant": "pld", "phases": [phase]}
        record: dict[str, Any] = to_json(
            {
                "schema_version": 1,
                "fedlora_version": "0.1.0",
                "code_digest": "c0de" * 16,
                "config_digest": config.digest(),
                "config": config.to_mapping(),
                "versions": {"python": "3.11.7", "torch": "2.9.0"},
                "started": "2026-11-22T02:58:44+0000",
                "wall_seconds": 75.25,
                "peak_memory_bytes": 1_400_000_000,
                "metric": {"name": "accuracy", "value": value, "split": "validation"},
                "metrics": {"accuracy": value},
                "bytes_up": 1000,
                "bytes_down": 2000,
                "clients": [{"client": number, **facts} for number in range(3)],
                "privacy": {
                    "guarantee": {"epsilon": spent, "delta": 1e-5, "accountant": "pld", "noise_seeded": seeded}
                },
            }
        )
        return record

    return make


@pytest.fixture(scope="session")
def make_run(make_record: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """`make_run(folder, "section.key=value", …)` makes the folder of a run, finished unless told otherwise."""

    def make(folder: Path, *overrides: str, rounds: int = 2, finished: bool = True, **facts: Any) -> Path:
        config = RunConfig().with_overrides(f"run.out={json.dumps(str(folder))}", *overrides)
        files = RunFolder.create(config)
        for number in range(rounds):
            spent = {"epsilon_max": 1.00001 + number, "seconds": 1.5}
            files.append_round({"round": number, "phase": "finetune", "metric": 0.7, **spent})
        if finished:
            files.write_record(make_record(*overrides, **facts))
        return folder

    return make
