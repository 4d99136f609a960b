"""A whole federated job: the example in both manners, and what is made of its times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")
pytest.importorskip("opacus")

from benchmarks import simulate
from benchmarks.flower_example import task
from benchmarks.process_tree import Outcome

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tiny_model: Callable[..., Path]) -> dict[str, Any]:
    return {
        "model-folder": str(tiny_model("bert")),
        "rank": 4,
        "alpha": 8.0,
        "generated-records": 64,
        "batch-size": 16,
        "learning-rate": 0.5,
        "noise-multiplier": 1.0,
        "max-grad-norm": 1.0,
        "target-delta": 1e-5,
    }


def test_a_cached_model_trains_again(settings: dict[str, Any]) -> None:
    cached = settings | {"model": "cached"}
    model, loader = task.get_model(cached), task.load_train_data(cached, 0, 2)
    start = {name: value.clone() for name, value in task.get_state(model).items()}
    for _ in range(2):
        before = {name: value.clone() for name, value in task.get_state(task.get_model(cached)).items()}
        assert task.train(model, loader, cached) > 0
        after = task.get_state(task.get_model(cached))
        assert all(not torch.equal(before[name], after[name]) for name in before)
    task.set_state(model, start)
    assert all(torch.equal(start[name], value) for name, value in task.get_state(task.get_model(cached)).items())


def test_a_model_per_message_is_another(settings: dict[str, Any]) -> None:
    anew = settings | {"model": "per message"}
    one, other = task.get_model(anew), task.get_model(anew)
    assert one is not other
    assert all(torch.equal(left, right) for left, right in zip(one.parameters(), other.parameters(), strict=True))


def test_extrapolation_counts_the_start_once() -> None:
    first, some = Outcome(30.0, 5, ""), Outcome(50.0, 7, "")  # 20 seconds of start, 10 for a round
    assert simulate.extrapolated(first, some, measured=3, rounds=20) == Outcome(20.0 + 20 * 10.0, 7, "")


@pytest.mark.slow
@pytest.mark.flower
def test_all_ways_in_small(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    small = ["--clients", "2", "--rounds", "3", "--example-rounds", "2", "--repeats", "1", "--cpus", "1"]
    subprocess.run(  # in a process of its own, which is bound to one CPU
        [
            sys.executable,
            "-m",
            "benchmarks.simulate",
            *small,
            "--model",
            str(tiny_model("bert", vocab_size=128)),
            "--out",
            tmp_path,
        ],
        cwd=REPOSITORY,
        env=os.environ,
        check=True,
        timeout=600,
    )
    facts, markdown = json.loads((tmp_path / "simulate.json").read_text()), (tmp_path / "simulate.md").read_text()
    assert facts["ways"].keys() == {
        simulate.COHORT,
        simulate.FLOAT32,
        simulate.FLOWER,
        simulate.CACHED,
        simulate.ANEW,
    }
    assert markdown.count("(extrapolated from 1 and 2 rounds)") == 2
    assert str(tmp_path) not in markdown
