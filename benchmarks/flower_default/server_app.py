"""FedAvg over Flower's own `start`, with a clock: one line when it begins and one after each round."""

from __future__ import annotations

import time

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.deployed.clock import note
from benchmarks.flower_default.task import get_model, get_state

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    notes, nodes = str(settings["notes"]), int(settings["nodes"])

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower calls it before the first round and after each; nothing is evaluated."""
        note(notes, round=server_round, ended=time.time(), arrays=len(arrays))
        return None

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    model = get_model(str(settings["model-folder"]), int(settings["rank"]))
    rounds = int(settings["rounds"])
    strategy.start(grid, ArrayRecord(get_state(model)), num_rounds=rounds, evaluate_fn=evaluate)
