"""The example's ClientApp: data, model and PrivacyEngine for every message."""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.flower_example.task import get_model, get_state, load_train_data, set_state, train

app = ClientApp()


@app.train()
def train_message(message: Message, context: Context) -> Message:
    """One epoch on this node's records."""
    settings: Any = message.content["config"]
    loader = load_train_data(settings, int(context.node_config["partition-id"]), settings["clients"])
    model = get_model(settings)
    arrays: Any = message.content["arrays"]
    set_state(model, arrays.to_torch_state_dict())
    epsilon = train(model, loader, settings)
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_state(model)),
            "metrics": MetricRecord({"num-examples": len(loader.dataset), "epsilon": epsilon}),  # type: ignore[arg-type]
        }
    )
    return Message(content, reply_to=message)
