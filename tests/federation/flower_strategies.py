"""What Flower's own strategies make of clients' vectors: an independent reference for the server's side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor


def record_of(vector: Tensor) -> ArrayRecord:
    return ArrayRecord({"theta": Array(vector.numpy())})


def aggregated(strategy: Any, vectors: Tensor, sizes: Sequence[int] | None = None, server_round: int = 1) -> Tensor:
    """What `strategy` makes of `vectors` [K, P] of clients with `sizes` records, equally many by default; [P]."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    replies = []
    for node, (vector, size) in enumerate(zip(vectors, sizes or [1] * len(vectors), strict=True)):
        content = RecordDict({"arrays": record_of(vector), "metrics": MetricRecord({"num-examples": size})})
        replies.append(Message(content, node + 1, "train"))
    arrays, _ = strategy.aggregate_train(server_round, replies)
    return torch.from_numpy(np.array(arrays["theta"].numpy()))
