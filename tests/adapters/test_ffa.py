from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlora.adapters.methods import ffa
from fedlora.randomness import PublicSeed

SEED = PublicSeed.from_int(5)


def test_the_frozen_factor_is_uniform_within_one_over_root_of_inputs() -> None:
    factor = ffa.frozen_factor(SEED, "layer.0.query", 64, 400)
    assert (factor.shape, factor.dtype, factor.requires_grad) == ((64, 400), torch.float32, False)
    assert factor.abs().max() <= 0.05
    assert factor.abs().max() > 0.0499
    assert factor.std() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert factor.mean().abs() < 0.001


def test_every_participant_derives_the_same_factor() -> None:
    factor = ffa.frozen_factor(SEED, "a", 4, 10)
    assert torch.equal(factor, ffa.frozen_factor(PublicSeed.from_int(5), "a", 4, 10))
    assert not torch.equal(factor, ffa.frozen_factor(SEED, "b", 4, 10))
    assert not torch.equal(factor, ffa.frozen_factor(PublicSeed.from_int(6), "a", 4, 10))


def test_the_frozen_factor_is_golden() -> None:
    """An exported adapter is rebuilt from the seed, so A must never change between versions."""
    wanted = torch.tensor([[-0.4431072, -0.4951144, -0.4945373], [0.2640216, 0.5135971, -0.1187658]])
    assert torch.allclose(ffa.frozen_factor(PublicSeed.from_int(0), "encoder.layer.0.query", 2, 3), wanted, atol=1e-6)


def test_no_global_generator_is_used(untouched_global_generator: None) -> None:
    ffa.frozen_factor(SEED, "a", 4, 10)


def test_layout_has_a_slot_for_every_b_then_the_head() -> None:
    modules = {"m.query": nn.Linear(6, 10), "m.value": nn.Linear(6, 3, bias=False)}
    head = {"dense": nn.Linear(10, 4), "out": nn.Linear(4, 2, bias=False)}
    places = {path: (path,) for path in modules}
    layout = ffa.build_layout(modules, head, places=places, rank=5, alpha=10.0)
    assert {slot.name: slot.shape for slot in layout.slots} == {
        "m.query/B": (10, 5),
        "m.value/B": (3, 5),
        "head:dense/weight": (4, 10),
        "head:dense/bias": (4,),
        "head:out/weight": (2, 4),
    }
    assert (layout.method, layout.rank, layout.alpha, layout.scale) == ("ffa", 5, 10.0, 2.0)
    frozen = ffa.build_layout(modules, {}, places=places, rank=5, alpha=10.0)
    assert [slot.name for slot in frozen.slots] == ["m.query/B", "m.value/B"]
