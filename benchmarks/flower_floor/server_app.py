"""Rounds of nothing, as `way` of the run's configuration says; one line when they begin and one after each."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.deployed.clock import note

POLL = 0.05
NUMBERS = 36_864
"""As many as MiniLM's adapters have: B of rank 8 on query and value of six layers."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    notes, nodes, rounds = str(settings["notes"]), int(settings["nodes"]), int(settings["rounds"])
    arrays = ArrayRecord({"B": Array(np.zeros(NUMBERS, dtype=np.float32))})
    if settings["way"] == "strategy":

        def evaluate(server_round: int, _: ArrayRecord) -> MetricRecord | None:
            note(notes, round=server_round, ended=time.time())
            return None

        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
        strategy.start(grid, arrays, num_rounds=rounds, evaluate_fn=evaluate)
        return
    there: list[int] = []
    while len(there) < nodes:
        time.sleep(POLL)
        there = [*grid.get_node_ids()]
    note(notes, round=0, ended=time.time())
    for server_round in range(1, rounds + 1):
        asked = _push(grid, there, MessageType.TRAIN, RecordDict({"arrays": arrays}))
        if settings["way"] == "awake":
            _push(grid, there, MessageType.QUERY, RecordDict())  # nobody waits for these
        while asked:
            time.sleep(POLL)
            asked -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(asked)}
        note(notes, round=server_round, ended=time.time())


def _push(grid: Grid, nodes: Iterable[int], kind: str, content: RecordDict) -> set[str]:
    return set(grid.push_messages([Message(content, node, kind) for node in nodes]))
