"""A classifier under `torch.compile`, for micro-batches of a bounded number of shapes.

Training cuts private records into few shapes (`engine.batching`), so each is compiled for itself; evaluations, whose
shapes are as ragged as their texts, run as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedlora.engine.backend import Batch
from fedlora.models import Classifier

_MOST_SHAPES = 256
"""Torch's own limit is 8, beyond which it silently goes on without compiling."""


def compiled_forward(classifier: Classifier) -> Callable[[Batch], Tensor]:
    """`classifier` as a function of a batch, compiled anew for each shape that it meets."""
    traced = torch.compile(classifier, dynamic=False)

    def forward(batch: Batch) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES, accumulated_recompile_limit=_MOST_SHAPES):
            logits: Tensor = traced(batch)
        return logits

    return forward
