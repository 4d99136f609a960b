"""Gradients through torch.compile are those without, in every shape, and no record tells in another's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedlora.engine.sums import clipped_sums

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself


@pytest.fixture
def benches(make_bench: Any) -> Any:
    options = "model.head=trained", "engine.token_budget=64", "privacy.seeded_noise=false"
    return [make_bench(*options, f"engine.compile={compile}") for compile in ("off", "on")]


@pytest.mark.slow
def test_the_same_sums_in_every_shape(benches: Any, random_records: Any, make_phase: Any) -> None:
    plain, compiled = benches
    assert (plain.execution.compiled, compiled.execution.compiled) == (False, True)
    data = random_records([5, 6, 7, 9, 12, 12, 14, 3, 16])
    phase, theta = make_phase(1.0, 0.0, 0.01), (plain.initial_theta + 0.3).repeat(2, 1)
    drawn = [torch.arange(4).numpy(), torch.arange(4, 9).numpy()]
    wanted, found = (clipped_sums(bench.backend, data, drawn, theta, phase, shapes=bench.shapes) for bench in benches)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_only_shapes_of_training_are_compiled(benches: Any, random_records: Any) -> None:
    """An evaluation has as many shapes as it has texts."""
    _, bench = benches
    data = random_records([5, 6, 7])
    torch._dynamo.utils.counters.clear()
    for record in range(3):
        batch, _ = data.batch(torch.tensor([record]).numpy())
        bench.backend.logits(bench.initial_theta, batch)
    assert not torch._dynamo.utils.counters["stats"]
    assert bench.shapes.patience == math.inf, "smaller micro-batches would be more shapes"
