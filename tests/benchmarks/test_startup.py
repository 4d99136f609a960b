"""The benchmark of starts runs, in small, and its stages add up to the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import startup


def test_every_command_answers_and_the_stages_are_the_way_to_the_first_step(
    tiny_model: Callable[..., Path], measured: Callable[..., tuple[dict[str, Any], str]]
) -> None:
    settings = [
        f"model.name={tiny_model('bert', vocab_size=128)}", "data.generated_records=240", "data.max_length=16",
        "federation.rounds=2", "federation.local_steps=2", "training.expected_batch_size=16", "privacy.delta=1e-3",
        "model.dtype=float32", "model.attention=eager", "engine.token_budget=256",
    ]  # fmt: skip
    overrides = [part for setting in settings for part in ("--set", setting)]
    facts, markdown = measured(startup, "--repeats", "1", "--cpus", "1", *overrides)
    assert list(facts["ways"]) == [startup.HELP, startup.CALIBRATE, startup.BUDGET, startup.FIRST_STEP]
    way = facts["ways"][startup.FIRST_STEP]
    stages = {stage: spread["median"] for stage, spread in way["stages"].items()}
    assert stages.keys() == {startup.IMPORTS, *startup.STAGES, startup.REST, startup.STEP}
    assert min(stages.values()) > 0, "each was on the way"
    assert sum(stages.values()) == pytest.approx(way["seconds"]["median"], abs=0.01)
    assert startup.FIRST_STEP in markdown
