"""How many clients fit follows from what a micro-batch and a client were measured to take."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.engine.batching import Shapes
from fedlora.engine.capacity import Footprint, MicroBatch, measure_footprint, most_clients, rough_footprint
from fedlora.engine.device_memory import peak_bytes
from fedlora.engine.sums import clipped_sums

CPU = torch.device("cpu")


def footprint(*, fused: bool = True) -> Footprint:
    """A client takes 100 bytes; a micro-batch 1,000, and 10 or 50 for each of at most 16 or 2 rows."""
    batches = MicroBatch(columns=8, fixed=1000, row=10), MicroBatch(columns=64, fixed=1000, row=50)
    return Footprint(client=100, micro_batches=batches, token_budget=128, fused=fused)


@pytest.mark.parametrize(
    ("usable", "fit"),
    [(0, 0), (1259, 0), (1260, 1), (1359, 1), (1360, 2), (2159, 9), (2160, 10), (1e12, 10)],
)
def test_as_many_clients_fit_as_their_bytes_do(usable: float, fit: int) -> None:
    """With 100 records expected of each client all 16 rows of 8 tokens are there: 1,160 bytes and 100 a client."""
    assert most_clients(footprint(), usable, 10, 100.0) == fit


def test_a_micro_batch_has_no_more_rows_than_records_are_expected() -> None:
    of_one, of_three = (footprint().of_call(clients, 4.0) for clients in (1, 3))
    assert of_one == max(1000 + 10 * 5, 1000 + 50 * 2) + 100
    assert of_three == max(1000 + 10 * 13, 1000 + 50 * 2) + 300
    assert footprint(fused=False).of_call(3, 4.0) == of_one + 200


@pytest.mark.parametrize("backend", ["expanded", "opacus"])
def test_a_footprint_is_what_full_micro_batches_are_measured_to_take(
    make_bench: Any, make_phase: Any, random_records: Any, backend: str
) -> None:
    """Measured on an eighth and a quarter of the rows; here on all of them, of real tokens."""
    bench = make_bench("engine.token_budget=512", f"engine.backend={backend}", "data.max_length=32")
    phase = make_phase(1.0, 1.0)

    def train(count: int) -> list[torch.Tensor]:
        return [torch.zeros(count, 300) for _ in range(2)]

    found = measure_footprint(
        bench.backend, phase, bench.initial_theta, train, token_budget=512, longest=32, classes=True
    )
    assert found.client == 2 * 4 * 300
    for batch in found.micro_batches:
        rows = 512 // batch.columns
        records, theta = random_records([batch.columns] * (rows - 1)), bench.initial_theta.repeat(2, 1)
        drawn = [np.arange(rows - 1), np.arange(0)]
        step = partial(clipped_sums, bench.backend, records, drawn, theta, phase, shapes=Shapes(512))
        assert batch.fixed + batch.row * rows == pytest.approx(peak_bytes(CPU, step), rel=0.05)
    assert [batch.columns for batch in found.micro_batches] == [8, 32]


def test_the_rough_bound_is_far_above_what_is_measured(make_bench: Any, make_phase: Any) -> None:
    bench = make_bench("data.max_length=32")
    weights = sum(weight.nbytes for weight in bench.classifier.parameters())
    rough = rough_footprint(bench.backend, weights=weights, token_budget=1024)
    found = measure_footprint(
        bench.backend,
        make_phase(1.0, 1.0),
        bench.initial_theta,
        lambda count: torch.zeros(count, 10 * bench.layout.size),
        token_budget=1024,
        longest=32,
        classes=True,
    )
    for clients in (1, 100):
        assert rough.of_call(clients, 1e3) > 2 * found.of_call(clients, 1e3)
