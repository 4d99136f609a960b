"""FedloraStrategy on an in-process Grid with the real ClientApp: Flower's Result of one of our runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, Result

import clients.app
import clients.simulated
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedloraError
from fedlora.experiments.run_folder import RunFolder
from server.app import prepare
from server.slot_arrays import to_arrays
from server.strategy import FedloraStrategy
from tests.flower.cohort_run import cohort_run, tensors
from tests.flower.local_grid import LocalGrid, Silent, forget, rounds, trained

pytestmark = pytest.mark.flower

ROOT = Path(__file__).resolve().parents[2]
ENGINE = """
import sys
from pathlib import Path
from simulations.flower import ConfiguredClientApp, leave, ray_engine
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from safetensors.torch import save_file
from fedlora.config import RunConfig
from server.strategy import FedloraStrategy

config, app = RunConfig.from_toml(Path(sys.argv[1])), ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    result = FedloraStrategy(config).start(grid)
    assert sorted(result.train_metrics_clientapp) == [0, 1, 2]
    save_file(result.arrays.to_torch_state_dict(), sys.argv[2])

with ray_engine(config, cpus=2) as workers:
    backend = workers.backend_config
    run_simulation(app, ConfiguredClientApp(config), num_supernodes=config.federation.clients, backend_config=backend)
leave(0)
"""


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """These nodes run in the test's process and not in Ray's, and each test is a process of its own to them."""
    monkeypatch.setattr(clients.app, "_in_simulation_engine", lambda: True)
    forget()
    clients.simulated._common.cache_clear()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)
    assert any(tensor.abs().max() > 0 for tensor in ours.values())


def test_the_result_is_that_of_our_run(config: RunConfig) -> None:
    evaluated = (
        "federation.private_evaluation=true",
        "data.heldout_share=0.3",
        "privacy.evaluation_noise_multiplier=2",
    )
    config = config.with_overrides(*evaluated)
    seen: list[tuple[int, ArrayRecord]] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append((number, arrays))
        return MetricRecord({"largest": max(float(tensor.abs().max()) for tensor in tensors(arrays).values())})

    result = FedloraStrategy(config, Silent()).start(LocalGrid(config), num_rounds=2, evaluate_fn=evaluate)
    ours = cohort_run(config)
    assert_same(ours.arrays(2), tensors(result.arrays))
    assert [number for number, _ in seen] == [0, 1, 2]
    assert all(float(tensor.abs().max()) == 0 for tensor in tensors(seen[0][1]).values())
    assert_same(ours.arrays(1), tensors(seen[1][1]))

    record = json.loads((Path(config.run.out) / "record.json").read_text())
    done = rounds(Path(config.run.out))
    assert [line["phase"] for line in done] == ["prototype", "finetune", "finetune", "evaluation"]
    facts = result.train_metrics_clientapp
    assert [facts[number]["epsilon-max"] for number in (0, 1, 2)] == [line["epsilon_max"] for line in done[:3]]
    assert {facts[number]["clients-ok"] for number in facts} == {3}
    for number, line in enumerate(done[:3]):
        found = dict(result.evaluate_metrics_serverapp[number])
        assert "largest" in found
        assert line["metrics"].items() <= found.items()
    private = result.evaluate_metrics_clientapp[2]
    assert private["accuracy"] == pytest.approx(record["private_evaluation"]["accuracy"])
    assert str(result), "Flower prints it"


def test_one_that_stopped_goes_on_and_its_result_is_whole(config: RunConfig) -> None:
    grid = LocalGrid(config)

    def fail_after_one(number: int, arrays: ArrayRecord) -> None:
        if number == 1:
            raise FedloraError("stop here")

    with pytest.raises(FedloraError, match="stop here"):
        FedloraStrategy(config, Silent()).start(grid, evaluate_fn=fail_after_one)
    asked = len(trained(grid))
    seen: list[int] = []
    result = FedloraStrategy(config, Silent()).start(grid, evaluate_fn=lambda number, arrays: seen.append(number))
    assert seen == [1, 2]
    assert len(trained(grid)) == asked + 3, "only the round that was missing"
    assert sorted(result.train_metrics_clientapp) == sorted(result.evaluate_metrics_serverapp) == [0, 1, 2]
    assert_same(cohort_run(config).arrays(2), tensors(result.arrays))


def test_chosen_modules_are_the_arrays_of_the_result(config: RunConfig) -> None:
    config = config.with_overrides("adapter.select=alignment", "adapter.warmup_rounds=1", "federation.rounds=3")
    seen: list[int] = []
    strategy = FedloraStrategy(config, Silent())
    result = strategy.start(LocalGrid(config), evaluate_fn=lambda number, arrays: seen.append(len(arrays)))
    record = json.loads((Path(config.run.out) / "record.json").read_text())
    chosen = {row["module"] + "/B" for row in record["selection"]["candidates"] if row["selected"]}
    assert set(result.arrays) == chosen
    assert seen == [12, 12, len(chosen), len(chosen)]
    assert sorted(result.train_metrics_clientapp) == [0, 1, 2, 3], "a round that scores modules trains nothing"


def test_a_timeout_is_the_rounds_deadline(config: RunConfig) -> None:
    grid = LocalGrid(config)
    result = FedloraStrategy(config, Silent()).start(grid, timeout=41)
    assert all(message.metadata.ttl <= 41 for message in grid.sent)
    assert RunFolder(Path(config.run.out)).read_config().federation.round_deadline == 41
    assert result.train_metrics_clientapp[2]["clients-ok"] == 3


def test_the_arrays_that_it_starts_from_may_be_named(config: RunConfig) -> None:
    workbench = prepare(config)
    initial = to_arrays(workbench.initial_theta, workbench.layout)
    workbench.detach()
    result = FedloraStrategy(config, Silent()).start(LocalGrid(config), initial)
    assert_same(cohort_run(config).arrays(2), tensors(result.arrays))
    others = ArrayRecord({name: Array(array.numpy() + 1) for name, array in initial.items()})
    with pytest.raises(ConfigError, match="initial_arrays have other values than this run starts from"):
        FedloraStrategy(config, Silent()).start(LocalGrid(config), others)
    fewer = ArrayRecord(dict(list(initial.items())[:3]))
    with pytest.raises(ConfigError, match=r"initial_arrays are not those of this run: .* wanted the 4 trained slots"):
        FedloraStrategy(config, Silent()).start(LocalGrid(config), fewer)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ({"num_rounds": 3}, r"num_rounds = 3, but federation\.rounds = 2"),
        ({"train_config": ConfigRecord({"lr": 0.1})}, "train_config has lr, which no site heeds"),
        ({"evaluate_config": ConfigRecord({"batch": 8})}, "evaluate_config has batch"),
        ({"timeout": 0.0}, r"federation\.round_deadline = 0"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_arguments_that_contradict_the_plan_are_refused_before_any_node_is_asked(
    config: RunConfig, argument: dict[str, object], said: str
) -> None:
    grid = LocalGrid(config)
    with pytest.raises(ConfigError, match=said):
        FedloraStrategy(config, Silent()).start(grid, **argument)  # type: ignore[arg-type]
    assert grid.sent == []
    assert not Path(config.run.out).exists()


def test_nothing_may_be_wrapped_around_it(config: RunConfig) -> None:
    """Flower's wrapper would add noise to what is noised already, and ask nodes what they do not answer."""
    grid = LocalGrid(config)
    wrapper = DifferentialPrivacyServerSideFixedClipping(FedloraStrategy(config), 1.0, 1.0, 3)
    with pytest.raises(FedloraError, match="FusedGrid"):
        wrapper.start(grid, ArrayRecord({"w": Array(torch.zeros(1).numpy())}), num_rounds=1)
    strategy, nothing = FedloraStrategy(config), list[Message]()
    for call in (strategy.aggregate_train, strategy.aggregate_evaluate):
        with pytest.raises(FedloraError, match="step by step"):
            call(1, nothing)
    with pytest.raises(FedloraError, match="step by step"):
        strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), grid)
    assert grid.sent == []


def test_without_anyone_watching_the_terminal_is_told(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    result = FedloraStrategy(config).start(LocalGrid(config))
    assert isinstance(result, Result)
    assert "3 clients, ffa rank 8" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.xdist_group("flower")
def test_in_flowers_simulation_engine_the_result_is_the_same(config: RunConfig, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    config = config.with_overrides("federation.join_deadline=300")  # of an engine that takes its time to start
    (tmp_path / "run.toml").write_text(config.to_toml())
    done = subprocess.run(
        [sys.executable, "-P", "-c", ENGINE, str(tmp_path / "run.toml"), str(tmp_path / "arrays.safetensors")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(cohort_run(config).arrays(2), load_file(tmp_path / "arrays.safetensors"))
