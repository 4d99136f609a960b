"""Sends back what came."""

from __future__ import annotations

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)


@app.query()
def stay_awake(message: Message, context: Context) -> Message:
    """Nothing to do, but while it is done the next instruction may come."""
    return Message(RecordDict(), reply_to=message)
