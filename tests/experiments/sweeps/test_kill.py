"""kill −9 of a whole sweep, and real clusters: slow."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.experiments.runs.store import Store
from fedlora.experiments.runs.stored_run import StoredRun

pytestmark = pytest.mark.slow
CELLS = 24
GRID = "[grid]\nprivacy.epsilon = [inf, 6.0, 1.0]\ntraining.learning_rate = [0.5, 1.0]\nrun.seed = [0, 1, 2, 3]\n"


def write_sweep(tiny_config: Callable[..., RunConfig], place: Path) -> Path:
    settings = ("federation.rounds=3", "federation.local_steps=1", "privacy.accountant=rdp", "model.head=prototype")
    (place / "tiny.toml").write_text(tiny_config(*settings).to_toml())
    file = place / "sweep.toml"
    file.write_text(f'recipe = "tiny.toml"\n{GRID}')
    return file


def start(file: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fedlora", "sweep", str(file), "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_hear_ctrl_c)


def _hear_ctrl_c() -> None:
    """As a terminal starts a command; what runs in the background ignores it, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def through(process: subprocess.Popen[bytes]) -> str:
    said = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 0, said
    return said


def tables(out: Path) -> list[str]:
    """What was measured; tables.md tells of runs that were stopped, and of seconds, besides."""
    return [(out / "report" / name).read_text() for name in ("metric.csv", "differences.csv")]


def rows(out: Path) -> dict[tuple[str, ...], Any]:
    with Store.open(out, read_only=True) as store:
        return {tuple(run.axes.values()): _essence(run) for run in store.runs()}


def _essence(run: StoredRun) -> Any:
    assert run.record is not None, run.error
    return run.digest, run.record["metrics"], [line["metrics"] for line in run.rounds], run.record["clients"]


def test_killed_five_times_a_sweep_ends_with_the_same_table(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    file, chance = write_sweep(tiny_config, tmp_path), random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    through(start(file, whole, "--workers", "2"))
    for kill in range(5):
        process = start(file, killed, "--workers", "2")
        wanted = (kill + 1) * CELLS // 7  # cells whose folder is there: somewhere in the middle of one
        while len(list(killed.glob("cells/*/config.toml"))) < wanted and process.poll() is None:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 2))
        assert process.poll() is None, "it ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    through(start(file, killed, "--workers", "2"))
    assert len(rows(whole)) == CELLS
    assert rows(killed) == rows(whole)
    assert len(list(killed.glob("cells/*"))) == CELLS, "none twice, none missing"
    assert tables(killed) == tables(whole)
    assert len(tables(whole)[0].splitlines()) == 1 + CELLS // 4, "a line for each of two rates at three ε"


def test_ctrl_c_names_the_command_that_goes_on(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    file, out = write_sweep(tiny_config, tmp_path), tmp_path / "out"
    process = start(file, out, "--workers", "2", "--set", "run.evaluate_every=3")
    while not list(out.glob("cells/*/rounds.jsonl")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130
    assert f"fedlora sweep {file} --set run.evaluate_every=3 --out {out} --workers 2 goes on" in said
    assert not _of_this_sweep(out), "no worker is left"


def _of_this_sweep(out: Path) -> list[str]:
    time.sleep(1)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(out) in line]


@pytest.mark.flower
@pytest.mark.xdist_group("flower")
def test_a_ray_cluster_runs_the_same_cells(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "tiny.toml").write_text(
        tiny_config("federation.rounds=1", "federation.local_steps=1", "privacy.accountant=rdp").to_toml()
    )
    file = tmp_path / "sweep.toml"
    file.write_text(
        'recipe = "tiny.toml"\n[axes.data]\nhere = {}\nno = { data.source = "nowhere" }\n[grid]\nrun.seed=[0,1]'
    )
    processes = {
        name: start(file, tmp_path / name, *options)
        for name, options in {"ray": ("--ray", "local"), "local": ("--workers", "2")}.items()
    }
    for process in processes.values():
        said = process.communicate(timeout=600)[0].decode()
        assert process.returncode == 1, said
        assert "done: 2, failed cells: 2" in said
    found = {}
    for name in processes:
        with Store.open(tmp_path / name, read_only=True) as store:
            found[name] = json.dumps(
                [(run.digest, run.error, run.record and run.record["metrics"]) for run in store.runs()]
            )
    assert found["ray"] == found["local"]
