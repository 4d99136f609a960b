"""python -m benchmarks.flower_example SETTINGS.json: its federation, started as fedlora's own is under Flower."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.flower_example.client_app import app as client_app
from benchmarks.flower_example.task import get_model, get_state, load_test_data, set_state, test
from fedlora.config import RunConfig
from simulations.flower import leave, ray_engine


def main(settings: dict[str, Any]) -> list[float]:
    """All rounds; accuracy after each."""
    accuracies: list[float] = []
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, _: Context) -> None:
        model, loader = get_model(settings), load_test_data(settings)

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round == 0:
                return None
            set_state(model, arrays.to_torch_state_dict())
            accuracies.append(test(model, loader))
            return MetricRecord({"accuracy": accuracies[-1]})

        FedAvg(fraction_evaluate=0.0, min_available_nodes=settings["clients"]).start(
            grid,
            ArrayRecord(get_state(model)),
            num_rounds=settings["rounds"],
            train_config=ConfigRecord(settings),
            evaluate_fn=evaluate,
        )

    config = RunConfig.from_mapping(
        {"federation": {"clients": settings["clients"]}, "run": {"device": "cpu", "workers": settings["clients"]}}
    )
    with ray_engine(config, settings["cpus"]) as workers:
        run_simulation(
            server_app=server_app,
            client_app=client_app,
            num_supernodes=workers.number,
            backend_config=workers.backend_config,
        )
    return accuracies


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    reached = main(asked)
    print(json.dumps({"accuracies": reached}))
    leave(0 if len(reached) == asked["rounds"] else 1)
