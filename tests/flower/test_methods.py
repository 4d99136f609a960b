"""Every method over Flower's transport ends where it ends in one process, with the same bytes and the same facts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr")

import clients.app
from fedlora.adapters.methods import METHODS
from fedlora.config import RunConfig
from fedlora.experiments.simulate import simulate
from tests.flower.local_grid import LocalGrid, Silent, run
from tests.flower.test_apps import fresh_process, run_over_both  # noqa: F401 a fixture

pytestmark = pytest.mark.flower


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients.app, "_in_simulation_engine", lambda: True)


def settings(config: RunConfig, method: str, epsilon: str) -> RunConfig:
    ranks = ["adapter.ranks=8,4"] if method in ("flora", "flexlora", "hetlora") else []
    return config.with_overrides(
        f"adapter.method={method}", f"privacy.epsilon={epsilon}", "federation.rounds=3", "federation.local_steps=2",
        "training.learning_rate=0.2", *ranks,
    )  # fmt: skip


@pytest.mark.parametrize("epsilon", ["inf", "6"])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.local])
def test_both_transports_end_with_the_same_adapter(
    config: RunConfig, tmp_path: Path, method: str, epsilon: str
) -> None:
    run_over_both(settings(config, method, epsilon), tmp_path, forgetful=True)


@pytest.mark.parametrize("epsilon", ["inf", "6"])
def test_what_a_site_keeps_for_itself_outlives_its_process(config: RunConfig, tmp_path: Path, epsilon: str) -> None:
    """Were B lost between messages, A would stay where it was: at B = 0 it has no gradient."""
    config = settings(config, "fedsa", epsilon)
    grid = LocalGrid(config)
    grid.forgetful = True
    fused = simulate(config.with_overrides(f"run.out='{tmp_path / 'cohort'}'"), Silent())
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (run(config, grid), fused))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)
    personal = [load_file(fused / f"personal/client-{client}/adapter_model.safetensors") for client in range(3)]
    for name, tensor in theirs.items():
        own = [adapter[name] for adapter in personal]
        if "lora_A" in name:
            assert all(torch.equal(tensor, one) for one in own), "A is everyone's"
        else:
            assert tensor.abs().max() == 0, "the server never saw a B"
            assert not torch.equal(own[0], own[1])
