"""Flower's simulation engine in its own process: the same result as the cohort, honest exit codes, nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora.config import RunConfig
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import simulate

pytest.importorskip("flwr")
pytest.importorskip("ray")
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.flower, pytest.mark.xdist_group("flower")]

ROOT = Path(__file__).resolve().parents[2]


class Launched:
    """`python -m simulations.flower RUN_DIR`, started outside the checkout; its mark is in every process it starts."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.mark = f"FEDLORA_TEST_MARK={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "simulations.flower", str(folder), "--cpus", "2"],
            cwd=folder.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT), name: value, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self) -> tuple[int, str]:
        try:
            said, _ = self.process.communicate(timeout=400)  # minutes where two cores are shared
        finally:
            self.process.kill()
        return self.process.returncode, said

    def leftovers(self, patience: float = 20.0) -> list[str]:
        """Commands of processes that carry the mark, after they had time to go."""
        end = time.monotonic() + patience
        while (found := [*self._marked()]) and time.monotonic() < end:
            time.sleep(0.2)
        return found

    def _marked(self) -> list[str]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text())
            except OSError:
                continue
        return [command for command in found if command]  # a zombie has none


class Silent:
    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...

    def round(self, report: Any) -> None: ...

    def finish(self, record: Any) -> None: ...


@pytest.fixture
def make_run(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    def make(*overrides: str) -> RunConfig:
        tables = {
            "model": {"name": str(tiny_model("bert")), "dtype": "float32", "attention": "eager"},
            "data": {"generated_records": 240, "max_length": 16},
            "federation": {"rounds": 3, "local_steps": 2},
            "training": {"expected_batch_size": 8},
            "privacy": {"seeded_noise": True, "accountant": "rdp", "delta": 1e-3},
            "engine": {"token_budget": 4096, "matmul_precision": "highest", "compile": "off"},
            "run": {"device": "cpu", "transport": "flower", "workers": 3, "out": str(tmp_path / "flower")},
        }
        return RunConfig.from_mapping(tables, overrides)

    return make


def test_interrupted_and_resumed_it_ends_with_the_cohorts_adapter(
    make_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_run("federation.rounds=6")
    folder = RunFolder.create(config)
    first = Launched(folder.path)
    end = time.monotonic() + 120
    while len(folder.read_rounds()) < 2 and first.process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert len(first.leftovers(patience=0)) > 3, "the mark is seen in Ray's processes"
    first.process.send_signal(signal.SIGINT)
    code, said = first.wait()
    assert code == 130, said
    assert "--resume" in said
    assert not folder.record_file.exists()
    assert first.leftovers() == []

    second = Launched(folder.path)
    code, said = second.wait()
    assert code == 0, said
    assert second.leftovers() == []
    assert [entry["round"] for entry in folder.read_rounds()] == list(range(7))
    assert "limits of each site's own policy" in folder.privacy_file.read_text()

    fused = simulate(make_run("federation.rounds=6", f"run.out='{tmp_path / 'cohort'}'"), Silent())
    ours, theirs = (load_file(next((path / "adapter").glob("adapter*.safetensors"))) for path in (folder.path, fused))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)
    records = [json.loads((path / "record.json").read_text()) for path in (folder.path, fused)]
    assert records[0]["clients"] == records[1]["clients"]


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two nodes with a CPU each, as on two machines."""
    ray_nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray_nodes.add_node(num_cpus=1)
    yield ray_nodes.address
    ray_nodes.shutdown()


@pytest.mark.parametrize("there", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["own Ray", "a cluster"])
def test_two_workers_with_a_share_of_the_clients_each_end_with_the_cohorts_adapter(
    make_run: Callable[..., RunConfig], tmp_path: Path, there: bool, request: pytest.FixtureRequest
) -> None:
    """Which process a worker's message meets is Ray's to choose; what its clients' optimisers keep follows them."""
    options = (
        "federation.clients=5", "data.generated_records=400", "federation.participation=0.6", "run.workers=2",
        "training.keep_state=true", "training.optimizer=adam", "training.learning_rate=0.1",
    )  # fmt: skip
    folder = RunFolder.create(make_run(*options))
    launched = Launched(folder.path, **({"RAY_ADDRESS": request.getfixturevalue("cluster")} if there else {}))
    code, said = launched.wait()
    assert code == 0, said
    assert launched.leftovers() == []
    assert [(line["clients_ok"], line["clients_failed"]) for line in folder.read_rounds()] == [(5, 0), *[(3, 0)] * 3]
    fused = simulate(make_run(*options, f"run.out='{tmp_path / 'cohort'}'"), Silent())
    ours, theirs = (load_file(next((path / "adapter").glob("adapter*.safetensors"))) for path in (folder.path, fused))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)
    records = [json.loads((path / "record.json").read_text()) for path in (folder.path, fused)]
    assert records[0]["clients"] == records[1]["clients"]


@pytest.mark.slow
@pytest.mark.parametrize("select", ["alignment", "bilevel"])
def test_it_chooses_the_modules_that_the_cohort_chooses(
    make_run: Callable[..., RunConfig], tmp_path: Path, select: str
) -> None:
    options = (f"adapter.select={select}", "adapter.search_rounds=1", "adapter.sharing=type", "federation.rounds=4")
    folder = RunFolder.create(make_run(*options))
    code, said = Launched(folder.path).wait()
    assert code == 0, said
    fused = simulate(make_run(*options, f"run.out='{tmp_path / 'cohort'}'"), Silent())
    ours, theirs = (load_file(next((path / "adapter").glob("adapter*.safetensors"))) for path in (folder.path, fused))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)
    records = [json.loads((path / "record.json").read_text()) for path in (folder.path, fused)]
    assert records[0]["clients"] == records[1]["clients"]
    chosen = [[row["selected"] for row in record["selection"]["candidates"]] for record in records]
    assert chosen[0] == chosen[1]


def test_a_failure_of_the_server_app_is_a_failure_of_the_command(make_run: Callable[..., RunConfig]) -> None:
    launched = Launched(RunFolder.create(make_run("model.name=/nowhere/at/all")).path)
    code, said = launched.wait()
    assert code == 2, said
    assert "/nowhere/at/all" in said
    assert "Traceback" not in said
    assert launched.leftovers() == []


def test_bad_input_is_found_before_anything_is_started(make_run: Callable[..., RunConfig]) -> None:
    folder = RunFolder.create(make_run("privacy.delta=0.4"))
    code, said = Launched(folder.path).wait()
    assert code == 2, said
    assert said.strip().splitlines()[-1].startswith("fedlora: privacy.delta = 0.4 is not below 1/n")
    assert "Traceback" not in said
    assert not folder.rounds_file.exists()


def test_one_gpu_for_all_workers_is_refused(make_run: Callable[..., RunConfig]) -> None:
    code, said = Launched(RunFolder.create(make_run("run.device=cuda:0")).path).wait()
    assert code == 2, said
    assert "CUDA_VISIBLE_DEVICES" in said.strip().splitlines()[-1]


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    code, said = Launched(tmp_path / "nothing").wait()
    assert code == 2, said
    assert "is not a run folder" in said
