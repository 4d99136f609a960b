"""Over real processes, TLS and SuperNode authentication: the same numbers as in one process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora.config import RunConfig
from fedlora.experiments.simulate import simulate
from tests.deployment.conftest import Deploy
from tests.deployment.deployed import failures

pytestmark = [pytest.mark.flower, pytest.mark.xdist_group("flower")]

MakeConfig = Callable[..., RunConfig]


class Silent:
    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...

    def round(self, report: Any) -> None: ...

    def finish(self, record: Any) -> None: ...


def test_two_sites_finish_a_run(deploy: Deploy, deployed_config: MakeConfig) -> None:
    deployment = deploy(deployed_config("federation.clients=2", "federation.rounds=2"))
    submission = deployment.submit("run")
    assert failures(deployment.check(submission)) == [{}, {}]
    for site in deployment.sites:
        assert site.said("answered", submission.run) == {0: 1, 1: 1}


@pytest.mark.slow
def test_the_adapter_is_the_simulations(deploy: Deploy, deployed_config: MakeConfig, tmp_path: Path) -> None:
    """Five rounds of three sites, with the same noise in both."""
    config = deployed_config("federation.rounds=5", "training.optimizer=adam", "training.learning_rate=0.05")
    known = [sys.executable, "-P", str(Path(__file__).with_name("seeded_site.py")), "0"]
    deployment = deploy(config, serve=known)
    submission = deployment.submit("run", "run.seed=0")
    assert failures(deployment.check(submission)) == [{}] * 5
    deployed = submission.folder.path
    simulated = simulate(
        config.with_overrides("privacy.seeded_noise=true", f"run.out='{tmp_path / 'simulated'}'"), Silent()
    )
    ours, theirs = (load_file(next((path / "adapter").glob("adapter*.safetensors"))) for path in (deployed, simulated))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)
    assert max(tensor.abs().max() for name, tensor in theirs.items() if "lora_B" in name) > 1e-2
    facts = [json.loads((path / "record.json").read_text())["clients"] for path in (deployed, simulated)]
    assert [one.pop("noise_seeded") for one in facts[0]] == [False] * 3
    assert [one.pop("noise_seeded") for one in facts[1]] == [True] * 3
    assert facts[0] == facts[1], "noise multipliers, steps and ε of each"
