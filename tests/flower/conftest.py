"""A short run on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.config import RunConfig


@pytest.fixture
def config(tiny_model: Callable[..., Path], tmp_path: Path) -> RunConfig:
    """Three clients, a prototype round and two rounds of fine-tuning."""
    return RunConfig.from_mapping(
        {
            "model": {"name": str(tiny_model("bert")), "dtype": "float32", "attention": "eager"},
            "data": {"generated_records": 240, "max_length": 16},
            "federation": {"rounds": 2, "local_steps": 2, "join_deadline": 0.2, "rejoin_deadline": 0.0},
            "training": {"expected_batch_size": 8},
            "privacy": {"seeded_noise": True, "accountant": "rdp", "delta": 1e-3},
            "engine": {"token_budget": 4096, "matmul_precision": "highest", "compile": "off"},
            "run": {"device": "cpu", "out": str(tmp_path / "flower")},
        }
    )
