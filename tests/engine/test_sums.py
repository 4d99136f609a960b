from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.adapters.slots import AdapterLayout
from fedlora.engine.batching import Shapes
from fedlora.engine.gates import GatedSlots
from fedlora.engine.sums import clipped_sums
from fedlora.privacy.clipping import Clipping
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.plan import PhasePlan
from fedlora.privacy.projection import LowPass
from fedlora.privacy.sampling import PoissonSampler
from tests.conftest import TableBackend

SIZE = 24_576
"""Of rank 8 on the way up of BERT-base. There a Fourier transform of one row rounds otherwise than one of two."""
CLIP = 1.0


def phase(kind: str, projection: LowPass | None = None) -> PhasePlan:
    return PhasePlan(
        name="finetune",
        sampler=PoissonSampler(1.0),
        clipping=Clipping(kind, CLIP),  # type: ignore[arg-type]
        mechanism=GaussianMechanism(1.0),
        num_steps=1,
        projection=projection,
    )


def moved_by_the_second(table: Tensor, plan: PhasePlan, **made: object) -> float:
    """How far record 1 moves the sum that record 0 is in."""
    backend = TableBackend(table, (table.shape[1],))
    alone, beside = (
        clipped_sums(
            backend,
            backend.dataset,
            [np.array(members)],
            torch.zeros(1, table.shape[1]),
            plan,
            shapes=Shapes(64),
            **made,  # type: ignore[arg-type]
        )
        for members in ([0], [0, 1])
    )
    return float((beside - alone).norm())


def test_a_projection_does_not_let_a_record_move_another_one() -> None:
    """Record 0 has energy only where the projection keeps nothing: what is left of it is rounding, clipped to full."""
    draw = torch.Generator().manual_seed(0)
    spectrum = torch.fft.rfft(1e5 * torch.randn(SIZE, generator=draw, dtype=torch.float64))
    spectrum[: len(spectrum) // 50] = 0
    hidden = torch.fft.irfft(spectrum, n=SIZE).float()
    smooth = torch.cos(2 * torch.pi * torch.arange(SIZE) / SIZE)
    assert moved_by_the_second(torch.stack([hidden, smooth]), phase("flat", LowPass(0.01))) <= CLIP


@pytest.mark.parametrize("size", [SIZE, 4 * SIZE])
def test_products_do_not_let_a_record_move_another_one(size: int) -> None:
    """Record 0's product with B cancels but for rounding."""
    draw = torch.Generator().manual_seed(0)
    half = torch.randn(size // 2, generator=draw) * torch.exp(6 * torch.randn(size // 2, generator=draw)) * 1e14
    order = torch.randperm(size, generator=draw)
    cancelling = torch.cat([half, -half[torch.randperm(size // 2, generator=draw)]])[order]
    plain = torch.zeros(size).index_fill_(0, torch.tensor([0]), 1.0)
    gated = GatedSlots.of(AdapterLayout.build({"m/B": (size // 8, 8)}, method="ffa", rank=8, alpha=8.0), ["m"])
    moved = moved_by_the_second(
        torch.stack([cancelling, plain]),
        phase("automatic"),
        vectors=lambda gradients, owner: [gated.products(gradients, torch.ones(1, size), owner)],
        width=1,
    )
    assert moved <= CLIP


def test_what_is_made_of_gradients_is_made_in_shapes_that_no_record_decides() -> None:
    shapes = []
    backend = TableBackend(torch.ones(5, 8), (8,))
    for members in ([0], [0, 1], [0, 1, 2, 3, 4]):

        def seen(gradients: list[Tensor], owner: Tensor) -> list[Tensor]:
            shapes.append((len(gradients[0]), len(owner)))
            return gradients

        clipped_sums(
            backend,
            backend.dataset,
            [np.array(members)],
            torch.zeros(1, 8),
            phase("flat"),
            shapes=Shapes(64),
            vectors=seen,
        )
    assert len(set(shapes)) == 1
