from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlora.adapters.methods import layout as layouts
from fedlora.errors import AdapterError, ConfigError
from fedlora.randomness import PublicSeed

SEED = PublicSeed.from_int(5)


def test_the_frozen_factor_is_uniform_within_one_over_root_of_inputs() -> None:
    factor = layouts.frozen_factor(SEED, "layer.0.query", 64, 400)
    assert (factor.shape, factor.dtype, factor.requires_grad) == ((64, 400), torch.float32, False)
    assert factor.abs().max() <= 0.05
    assert factor.abs().max() > 0.0499
    assert factor.std() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert factor.mean().abs() < 0.001


def test_every_participant_derives_the_same_factor() -> None:
    factor = layouts.frozen_factor(SEED, "a", 4, 10)
    assert torch.equal(factor, layouts.frozen_factor(PublicSeed.from_int(5), "a", 4, 10))
    assert not torch.equal(factor, layouts.frozen_factor(SEED, "b", 4, 10))
    assert not torch.equal(factor, layouts.frozen_factor(PublicSeed.from_int(6), "a", 4, 10))


def test_the_frozen_factor_is_golden() -> None:
    """An exported adapter is rebuilt from the seed, so A must never change between versions."""
    wanted = torch.tensor([[-0.4431072, -0.4951144, -0.4945373], [0.2640216, 0.5135971, -0.1187658]])
    assert torch.allclose(
        layouts.frozen_factor(PublicSeed.from_int(0), "encoder.layer.0.query", 2, 3), wanted, atol=1e-6
    )


def test_no_global_generator_is_used(untouched_global_generator: None) -> None:
    layouts.frozen_factor(SEED, "a", 4, 10)


def test_layout_has_a_slot_for_every_b_then_the_head() -> None:
    modules = {"m.query": nn.Linear(6, 10), "m.value": nn.Linear(6, 3, bias=False)}
    head = {"dense": nn.Linear(10, 4), "out": nn.Linear(4, 2, bias=False)}
    places = {path: (path,) for path in modules}
    layout = layouts.build_layout(modules, head, places=places, rank=5, alpha=10.0)
    assert {slot.name: slot.shape for slot in layout.slots} == {
        "m.query/B": (10, 5),
        "m.value/B": (3, 5),
        "head:dense/weight": (4, 10),
        "head:dense/bias": (4,),
        "head:out/weight": (2, 4),
    }
    assert (layout.method, layout.rank, layout.alpha, layout.scale) == ("ffa", 5, 10.0, 2.0)
    frozen = layouts.build_layout(modules, {}, places=places, rank=5, alpha=10.0)
    assert [slot.name for slot in frozen.slots] == ["m.query/B", "m.value/B"]


MODULES = {f"{layer}.{kind}": nn.Linear(6, 3 if kind == "up" else 10) for layer in range(3) for kind in ("query", "up")}


def test_one_slot_and_one_factor_for_modules_that_share() -> None:
    places = {"1.query": ("1.query",), "shared/query/6x10": ("0.query", "2.query"), "shared/up/6x3": ("2.up",)}
    layout = layouts.build_layout(MODULES, {}, places=places, rank=5, alpha=10.0)
    assert [(slot.name, slot.shape) for slot in layout.slots] == [
        ("1.query/B", (10, 5)),
        ("shared/query/6x10/B", (10, 5)),
        ("shared/up/6x3/B", (3, 5)),
    ]
    assert layout.size == 5 * (10 + 10 + 3)
    factors = layouts.frozen_factors(SEED, MODULES, places, 5)
    assert factors.keys() == places.keys()
    for name, factor in factors.items():
        assert torch.equal(factor, layouts.frozen_factor(SEED, name, 5, 6))


def test_slots_come_in_the_order_of_places_and_both_must_fit() -> None:
    places = {"2.up": ("2.up",), "0.query": ("0.query",)}
    layout = layouts.build_layout(MODULES, {"out": nn.Linear(3, 2)}, places=places, rank=1, alpha=1.0)
    assert [slot.name for slot in layout.slots] == ["2.up/B", "0.query/B", "head:out/weight", "head:out/bias"]
    layouts.check_places(layout, places)
    for other in ({}, {"2.up": ("2.up",)}, dict(reversed(places.items())), places | {"1.up": ("1.up",)}):
        with pytest.raises(AdapterError, match="build both from one mask"):
            layouts.check_places(layout, other)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"shared/any": ("0.query", "0.up")}, "shapes 6x3, 6x10; only modules of one shape"),
        ({"shared/query/6x10": ()}, "shapes none"),
        ({"0.query": ("0.query",), "shared/query/6x10": ("0.query", "1.query")}, "0.query is given to more than one"),
        ({"shared/up/6x3": ("0.up", "0.up")}, "0.up is given to more than one"),
        ({"9.query": ("9.query",)}, "9.query, which is not among the 6 linears"),
    ],
)
def test_places_that_no_model_can_have_are_refused(places: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        layouts.build_layout(MODULES, {}, places=places, rank=2, alpha=1.0)


@pytest.mark.parametrize("method", ["fed_sb", "fed_sb_svd"])
def test_an_r_with_more_directions_than_a_module_has_is_refused(method: str) -> None:
    places = {"0.query": ("0.query",), "1.up": ("1.up",)}
    layouts.build_layout(MODULES, {}, places=places, rank=3, alpha=1.0, method=method)
    with pytest.raises(ConfigError, match=r"adapter.rank = 4 is above the smaller side of 1.up \(3x6\)"):
        layouts.build_layout(MODULES, {}, places=places, rank=4, alpha=1.0, method=method)
