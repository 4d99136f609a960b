"""The outer factors of fed_sb_svd: made of what two rounds have learnt, which is kept, and better than random ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.methods import Turn
from fedlora.federation.merging import _outer_factors
from fedlora.federation.messages import LARGEST_VALUE

SETTINGS = (
    "adapter.method=fed_sb_svd",
    "privacy.epsilon=inf",
    "training.learning_rate=0.5",
    "federation.rounds=3",
    "federation.local_steps=4",
)


def rounds_of(federation: Any) -> list[Tensor]:
    """theta before the first round and after each."""
    start = federation.start()
    seen = [start.theta.clone()]
    federation.server(on_round=lambda report, state: seen.append(state.theta.clone())).run(
        replace(start, theta=start.theta.clone())
    )
    return seen


def factors_of(bench: Any, theta: Tensor) -> dict[str, dict[str, Tensor]]:
    slots = {slot.name: slot for slot in bench.layout.slots}
    return {
        name: {part: bench.layout.view(theta, slots[f"{name}/{part}"]).double() for part in "BRA"}
        for name in bench.places
    }


def pull(federation: Any, theta: Tensor) -> float:
    """Norm of the gradient of all records' mean loss in the directions that R can move the model in."""
    bench, dataset = federation.workbench, federation.dataset
    batch, labels = dataset.batch(np.arange(len(dataset)))
    owner = torch.zeros(len(dataset), dtype=torch.int64)
    found = bench.backend.gradients(theta[None], batch, labels, owner, Turn(("R",), ("B", "A")))
    return float(torch.cat([part.mean(dim=0) for part in found]).norm())


def test_b_has_its_round_then_a_then_r(make_federation: Any) -> None:
    federation = make_federation(*SETTINGS)
    bench, one = federation.workbench, torch.eye(4, dtype=torch.float64)
    start, after_b, after_a, end = rounds_of(federation)
    for own in factors_of(bench, start).values():
        assert not own["B"].any(), "training starts at the base model"
        assert torch.equal(own["R"], one)
    for own in factors_of(bench, after_b).values():
        assert torch.allclose(own["B"].T @ own["B"], one, atol=1e-5)
        assert torch.equal(own["R"], one)
        assert own["A"].any(), "what the round has learnt is kept"
    first, last = factors_of(bench, after_a), factors_of(bench, end)
    for name, own in first.items():
        assert torch.allclose(own["B"].T @ own["B"], one, atol=1e-5)
        assert torch.allclose(own["A"] @ own["A"].T, one, atol=1e-5)
        assert torch.equal(own["R"], own["R"].diag().diag())
        assert (own["R"].diag() > 0).all()
        for part in "BA":
            assert torch.equal(own[part], last[name][part]), "from here on R alone moves"
        assert not torch.equal(own["R"], last[name]["R"])


def test_they_see_more_of_the_gradient_than_random_ones(make_federation: Any) -> None:
    """What R can do is bounded by what of the gradient lies between its outer factors."""
    federation = make_federation(*SETTINGS)
    bench = federation.workbench
    learnt = rounds_of(federation)[2]
    for slot in bench.layout.slots:
        if slot.part == "R":  # so that all gradients are those of the base model
            bench.layout.view(learnt, slot).zero_()
    draw = torch.Generator().manual_seed(0)
    random = []
    for _ in range(8):
        theta = learnt.clone()
        for slot in bench.layout.slots:
            view = bench.layout.view(theta, slot)
            if slot.part == "B":
                view.copy_(torch.linalg.qr(torch.randn(slot.shape, generator=draw))[0])
            elif slot.part == "A":
                view.copy_(torch.linalg.qr(torch.randn(slot.shape[::-1], generator=draw))[0].T)
        random.append(pull(federation, theta))
    assert pull(federation, learnt) > 1.5 * max(random)


def test_r_moves_at_its_own_rate(make_federation: Any) -> None:
    def moved(*more: str) -> Tensor:
        federation = make_federation(*SETTINGS, *more)
        _, _, before, after = rounds_of(federation)
        return (after - before)[federation.workbench.layout.positions(("R",))]

    torch.testing.assert_close(moved("adapter.rate_of_r=0.01", "federation.local_steps=1"),
                               0.01 * moved("federation.local_steps=1"), rtol=1e-3, atol=1e-5)  # fmt: skip


def test_what_singular_values_hold_together_is_nothing_that_a_site_would_refuse(make_federation: Any) -> None:
    """A singular value is as long as a factor of many numbers, each of which may be sent."""
    federation = make_federation(*SETTINGS)
    bench, draw = federation.workbench, torch.Generator().manual_seed(0)
    theta = federation.start().theta.clone()
    for entry, part in zip(bench.schedule, "BA", strict=False):
        for slot in bench.layout.slots:
            if slot.part == part:
                bench.layout.view(theta, slot).copy_((4 * torch.randn(slot.shape, generator=draw)).clamp(-9, 9))
        made = _outer_factors(bench, theta, entry)
        assert made.abs().max() <= LARGEST_VALUE
        for name, own in factors_of(bench, theta).items():
            product, wanted = (found["B"] @ found["R"] @ found["A"] for found in (factors_of(bench, made)[name], own))
            assert torch.linalg.matrix_norm(wanted, 2) > LARGEST_VALUE
            assert (product - wanted).norm() <= 1e-5 * wanted.norm()
        theta = made
