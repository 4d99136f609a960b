"""The quickstart's ClientApp, with a clock: model and records anew for every message."""

from __future__ import annotations

import time

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.deployed.clock import note, process_started
from benchmarks.flower_default.task import get_model, get_state, load_data, train

IMPORTED = time.time()

app = ClientApp()


@app.train()
def train_message(message: Message, context: Context) -> Message:
    """A few steps on this node's records."""
    settings, node = context.run_config, context.node_config
    model_folder = str(settings["model-folder"])
    called = time.time()
    model = get_model(model_folder, int(settings["rank"]))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)  # type: ignore[union-attr]
    loaded = time.time()
    loader = load_data(str(node["data"]), model_folder, int(settings["batch-size"]))
    began = time.time()
    loss = train(model, loader, int(settings["local-steps"]))
    ended = time.time()
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})  # type: ignore[arg-type]
    content = RecordDict({"arrays": ArrayRecord(get_state(model)), "metrics": metrics})
    note(
        str(node["notes"]),
        round=message.content["config"]["server-round"],
        process_started=process_started(),
        imported=IMPORTED,
        called=called,
        loaded=loaded,
        began=began,
        ended=ended,
    )
    return Message(content, reply_to=message)
