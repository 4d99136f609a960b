from __future__ import annotations

import itertools

import pytest

from fedlora.adapters.dam import Candidate, ModuleMask, overlap
from fedlora.errors import AdapterError

Candidates = tuple[Candidate, ...]


def mask(candidates: Candidates, *chosen: int) -> ModuleMask:
    return ModuleMask(candidates, tuple(index in chosen for index in range(len(candidates))))


def test_modules_come_in_the_models_order(candidates: Candidates) -> None:
    assert mask(candidates, 7, 0).modules == ("encoder.layer.0.query", "encoder.layer.1.key")


def test_modules_not_chosen_share_by_type_and_shape(candidates: Candidates) -> None:
    sharing = mask(candidates, 0, 1, 2, 3, 7, 8, 9).sharing
    assert sharing == {
        "shared/up/4x16": ("encoder.layer.0.up", "encoder.layer.1.up"),
        "shared/down/16x4": ("encoder.layer.0.down", "encoder.layer.1.down"),
        "shared/query/4x4": ("encoder.layer.1.query",),
    }


def test_a_mask_has_the_models_size_and_chooses_something(candidates: Candidates) -> None:
    with pytest.raises(AdapterError, match="a mask of 2 modules, this model has 12 candidates"):
        ModuleMask(candidates, (True, False))
    with pytest.raises(AdapterError, match="chooses no module"):
        mask(candidates)


def test_overlap_is_the_share_of_the_larger_choice_that_both_made(candidates: Candidates) -> None:
    whole, half, other = mask(candidates, *range(12)), mask(candidates, *range(6)), mask(candidates, *range(6, 12))
    assert overlap(half, half) == 1
    assert overlap(half, other) == 0
    assert overlap(half, whole) == overlap(whole, half) == 0.5
    assert overlap(mask(candidates, 0, 1, 2), mask(candidates, 2, 3)) == pytest.approx(1 / 3)


def test_halves_overlap_by_half_on_average(candidates: Candidates) -> None:
    few = candidates[:6]
    halves = [mask(few, *chosen) for chosen in itertools.combinations(range(6), 3)]
    for first in halves:
        assert sum(overlap(first, second) for second in halves) / len(halves) == pytest.approx(0.5)


def test_masks_of_different_models_have_no_overlap(candidates: Candidates) -> None:
    with pytest.raises(AdapterError, match="masks over 12 and 6 candidates"):
        overlap(mask(candidates, 0), mask(candidates[:6], 0))
