from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapters.slots import AdapterLayout, Slot
from fedlora.errors import AdapterError

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=12), st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1
)
BASE: dict[str, tuple[int, ...]] = {"layer.0.query/B": (6, 2), "layer.0.value/B": (4, 2), "head:out/bias": (3,)}


def build(shapes: dict[str, tuple[int, ...]] = BASE, **facts: Any) -> AdapterLayout:
    return AdapterLayout.build(shapes, **{"method": "ffa", "rank": 2, "alpha": 4.0, **facts})


@given(SHAPES)
def test_slots_tile_the_flat_vector_without_gap_or_overlap(shapes: dict[str, tuple[int, ...]]) -> None:
    layout = build(shapes)
    assert [slot.name for slot in layout.slots] == list(shapes)
    covered = torch.zeros(layout.size)
    for slot in layout.slots:
        view = layout.view(covered, slot)
        assert view.shape == shapes[slot.name]
        assert slot.size == view.numel()
        view += 1
    assert (covered == 1).all()
    assert layout.size == sum(math.prod(shape) for shape in shapes.values())


@given(SHAPES, st.integers(1, 3), st.integers(1, 3))
def test_a_view_keeps_leading_dimensions_and_shares_memory(
    shapes: dict[str, tuple[int, ...]], clients: int, steps: int
) -> None:
    layout = build(shapes)
    flat = torch.arange(clients * steps * layout.size, dtype=torch.float32).view(clients, steps, layout.size)
    for slot in layout.slots:
        view = layout.view(flat, slot)
        assert view.shape == (clients, steps, *slot.shape)
        wanted = flat[..., slot.offset : slot.offset + slot.size]
        assert torch.equal(view.flatten(2), wanted)
        assert view.data_ptr() == wanted.data_ptr()


@pytest.mark.parametrize("size", [0, 22, 24])
def test_a_flat_vector_of_another_length_is_refused(size: int) -> None:
    layout = build()
    with pytest.raises(AdapterError, match=f"has {size} numbers, this layout wants 23"):
        layout.view(torch.zeros(size), layout.slots[0])


def test_equal_layouts_have_equal_digests_and_every_difference_shows() -> None:
    reference = build()
    assert build(dict(BASE)).digest == reference.digest
    assert len(reference.digest) == 64
    reordered = dict(reversed(BASE.items()))
    moved = dataclasses.replace(
        reference, slots=(dataclasses.replace(reference.slots[0], offset=1), *reference.slots[1:])
    )
    others = [
        build(rank=3),
        build(alpha=8.0),
        build(method="lora"),
        build(reordered),
        build({**BASE, "extra/B": (1, 2)}),
        build({**BASE, "layer.0.query/B": (2, 6)}),
        build({**{f"{name}x": shape for name, shape in BASE.items()}}),
        moved,
    ]
    assert len({layout.digest for layout in others} | {reference.digest}) == len(others) + 1


def test_a_digest_is_the_same_in_every_process_and_version() -> None:
    """Golden: both sides of a message compare it, so it must not depend on hash seeds, platforms or Python."""
    assert build().digest == "43865deb2f46afd60ce08cbbc9c0f7a4f7a2a578bd727be35890d76e550616ae"


def test_scale_is_alpha_over_rank() -> None:
    assert build(rank=8, alpha=16.0).scale == 2.0


def test_a_layout_is_immutable_and_hashable() -> None:
    layout = build()
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.rank = 9  # type: ignore[misc]
    assert len({layout, build()}) == 1
    assert layout.slots[0] == Slot("layer.0.query/B", (6, 2), 0)


def test_no_wrapper_leaks_into_the_names_of_a_real_layout(make_bench: Any) -> None:
    for backend in ("expanded", "opacus"):
        names = [slot.name for slot in make_bench(f"engine.backend={backend}", "model.head=trained").layout.slots]
        assert names[0] == "encoder.layer.0.attention.self.query/B"
        assert names[-1] == "head:classifier/bias"
        assert not [name for name in names for part in ("_module.", "base_model", ".default", ".base") if part in name]
