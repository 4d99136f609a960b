"""The benchmark of GPUs runs on a CPU in small, and without the packages that machines with GPUs may lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import accelerator
from benchmarks.fused import WAYS

REPOSITORY = Path(__file__).resolve().parents[2]
LACKING = ("opacus", "flwr", "ray", "dp_accounting", "randomgen", "datasets", "tomli_w")
WITHOUT = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LACKING}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from benchmarks.accelerator import main
main()
"""


def run(*options: str) -> str:
    """What the benchmark prints in a process that lacks these packages."""
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT, *options],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_the_tiny_run_needs_neither_flower_nor_opacus(tmp_path: Path) -> None:
    run("--tiny", "--repeats", "1", "--steps", "1", "--compiler", "eager", "--out", str(tmp_path))
    facts = json.loads((tmp_path / "accelerator.json").read_text())
    assert facts["step"]["ways"].keys() == {
        accelerator.PEFT,
        accelerator.PEFT_COMPILED,
        *accelerator.BASELINES,
    }
    assert facts["step"]["apart"] == dict.fromkeys(accelerator.BASELINES, True)
    assert 0 < facts["step"]["flops"] < 1e9
    assert [(row["clients"], row["ways"].keys() == set(WAYS)) for row in facts["clients"]] == [(2, True), (3, True)]
    assert facts["missed"] == []
    assert "a tiny model has none" in (tmp_path / "accelerator.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["accelerator", "--out", str(tmp_path)])
    accelerator.main()
    assert capsys.readouterr().out == "no accelerator here; not measured\n"
    assert not list(tmp_path.iterdir())


def facts(to_plain: float, milliseconds: float, speed_up: float) -> dict[str, Any]:
    way = {"to_plain": {"median": to_plain}, "milliseconds": [0, milliseconds, 0]}
    row = {"clients": 16, "shape": "8x32", "model": "MiniLM-L6", "times_as_fast_as_apart": {"median": speed_up}}
    ways = {accelerator.OURS: way, accelerator.OURS_COMPILED: way}
    return {"step": {"ways": ways, "apart": dict.fromkeys(ways, True)}, "clients": [row]}


@pytest.mark.parametrize(
    ("given", "count"),
    [((1.02, 66.0, 10.0), 0), ((1.03, 66.0, 10.0), 2), ((1.0, 67.0, 10.0), 1), ((1.0, 60.0, 9.0), 1)],
)
def test_an_aim_is_missed_beyond_it(given: tuple[float, float, float], count: int) -> None:
    assert len(accelerator.missed(facts(*given))) == count


def test_influence_between_records_is_a_miss() -> None:
    found = facts(1.0, 60.0, 10.0)
    found["step"]["apart"][accelerator.OURS] = False
    assert len(accelerator.missed(found)) == 1
