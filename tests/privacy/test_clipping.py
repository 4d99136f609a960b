"""No record moves the clipped sum by more than C, whatever its gradient."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from fedlora.privacy.clipping import AUTOMATIC_STABILITY, Clipping

KINDS = ("flat", "automatic")
Kind = Literal["flat", "automatic"]
ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True)
ROWS = st.tuples(st.integers(1, 6), st.integers(1, 12)).flatmap(lambda s: arrays(np.float32, s, elements=ANY_FLOAT))


def contributions(clipping: Clipping, rows: Tensor, widths: tuple[int, ...] = ()) -> Tensor:
    """[N, P] float64: what each row alone adds, through the real path, one owner per row."""
    total = torch.zeros_like(rows, dtype=torch.float64)
    parts = [part.clone() for part in rows.split(widths or (rows.shape[1],), dim=1)]
    clipping.add_clipped(total, parts, torch.arange(len(rows)))
    return total


@settings(max_examples=300)
@given(ROWS, st.sampled_from(KINDS), st.floats(1e-3, 1e3))
def test_no_contribution_is_longer_than_the_clip_norm(values: np.ndarray, kind: Kind, clip_norm: float) -> None:
    added = contributions(Clipping(kind, clip_norm), torch.from_numpy(values))
    assert torch.isfinite(added).all()
    assert (added.norm(dim=1) <= clip_norm * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [10, 1_000, 200_000])
def test_the_bound_holds_for_long_vectors_in_float32(kind: Kind, size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    rows = torch.randn(4, size, generator=draw) * torch.tensor([[1e-4], [1.0], [1e6], [1e12]])
    added = contributions(Clipping(kind, 0.7), rows)
    assert (added.norm(dim=1) <= 0.7 * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_joint_over_all_slots(kind: Kind) -> None:
    rows = torch.randn(5, 60, generator=torch.Generator().manual_seed(0)) * 3
    whole = contributions(Clipping(kind, 1.0), rows)
    for widths in ((1, 59), (20, 20, 20), (1,) * 60):
        assert torch.allclose(contributions(Clipping(kind, 1.0), rows, widths), whole, atol=1e-6)
    assert (whole.norm(dim=1) > 0.98).all(), "per-slot clipping would give a longer vector, a loose bound a shorter one"


def test_flat_leaves_short_vectors_alone_and_cuts_long_ones_to_length() -> None:
    rows = torch.tensor([[0.3, 0.4], [3.0, 4.0], [0.0, 0.0]])
    added = contributions(Clipping("flat", 1.0), rows)
    assert torch.allclose(added, torch.tensor([[0.3, 0.4], [0.6, 0.8], [0.0, 0.0]]).double(), atol=1e-7)


def test_automatic_normalises_as_auto_s() -> None:
    rows = torch.tensor([[0.3, 0.4], [3.0, 4.0], [0.0, 0.0]])
    norms = torch.tensor([[0.5], [5.0], [0.0]])
    added = contributions(Clipping("automatic", 2.0), rows)
    assert torch.allclose(added, (2.0 * rows / (norms + AUTOMATIC_STABILITY)).double(), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_adds_exactly_zero_and_disturbs_no_other(kind: Kind, poison: float) -> None:
    rows = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    clean = contributions(Clipping(kind, 1.0), rows, (5, 15))
    rows[2, 7] = poison
    added = contributions(Clipping(kind, 1.0), rows, (5, 15))
    assert not added[2].any()
    keep = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(added[keep], clean[keep])


@pytest.mark.parametrize("kind", KINDS)
def test_a_finite_row_whose_norm_overflows_adds_nothing(kind: Kind) -> None:
    rows = torch.full((2, 50), 3e38)
    rows[1] = 0.1
    added = contributions(Clipping(kind, 1.0), rows)
    assert not added[0].any()
    assert added[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_outlier_moves_the_sum_of_its_owner_by_the_clip_norm_at_most(kind: Kind) -> None:
    rows = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    owner = torch.tensor([0, 1, 0, 1, 1, 0])
    clean, with_outlier = torch.zeros(2, 2, 20, dtype=torch.float64)
    Clipping(kind, 0.5).add_clipped(clean, [rows[torch.arange(6) != 2]], owner[torch.arange(6) != 2])
    rows[2] *= 1e6
    Clipping(kind, 0.5).add_clipped(with_outlier, [rows.clone()], owner)
    assert torch.equal(clean[1], with_outlier[1])
    assert (clean[0] - with_outlier[0]).norm() == pytest.approx(0.5, rel=1e-5)


def test_sums_add_up_over_calls_and_land_in_their_owners_row() -> None:
    rows = torch.randn(7, 8, generator=torch.Generator().manual_seed(0)) * 2
    owner = torch.tensor([2, 0, 0, 2, 2, 0, 2])
    clipping = Clipping("flat", 1.0)
    each = contributions(clipping, rows)
    total = torch.zeros(3, 8, dtype=torch.float64)
    for start in (0, 3, 6):
        clipping.add_clipped(
            total, [rows[start : start + 3, :3].clone(), rows[start : start + 3, 3:].clone()], owner[start : start + 3]
        )
    for client in range(3):
        assert torch.allclose(total[client], each[owner == client].sum(dim=0), atol=1e-6)
    assert not total[1].any()


@given(st.lists(ANY_FLOAT.map(abs), min_size=1, max_size=8), st.sampled_from(KINDS), st.floats(1e-3, 1e3))
def test_weights_lie_between_zero_and_clip_norm_over_norm(norms: list[float], kind: Kind, clip_norm: float) -> None:
    given_norms = torch.tensor(norms)
    weights = Clipping(kind, clip_norm).weights(given_norms)
    finite = torch.isfinite(given_norms)
    assert (weights[~finite] == 0).all()
    assert (weights >= 0).all()
    products = weights[finite].double() * given_norms[finite].double()
    assert (products <= clip_norm * (1 + 1e-6)).all()


def test_many_small_numbers_beside_large_ones_are_in_the_norm() -> None:
    """A float32 norm of such a row comes out too small, and the clipped row 0.1 % too long."""
    rows = torch.full((1, 768 * 768), 2e-4)
    rows[0, :8] = 1e3
    added = contributions(Clipping("flat", 1.0), rows)
    assert added.norm() <= 1.0


def test_a_record_moves_a_long_sum_by_its_own_length() -> None:
    """In float32 it can move it by more, as where all its numbers are rounded up (Casacuberta et al. 2022)."""
    clipping, owner = Clipping("flat", 1.0), torch.zeros(1, dtype=torch.int64)
    rows, row = torch.full((40_000, 4), 0.5 / 3), torch.full((1, 4), 0.49985)
    total = torch.zeros(1, 4, dtype=torch.float64)
    clipping.add_clipped(total, [rows], owner.repeat(len(rows)))
    before = total.clone()
    clipping.add_clipped(total, [row.clone()], owner)
    assert (total - before).norm() == pytest.approx(float(row.norm()), abs=2e-6)
    assert (total - before).norm() <= row.double().norm()
    single = before.float()
    assert ((single + row) - single).norm() > 1.0002 * row.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_records_of_many_owners_are_added_up_as_those_of_few_are(kind: Kind) -> None:
    """Both ways of adding up, with rows that are not finite among them."""
    rows = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    rows[3], rows[7, 2] = torch.nan, torch.inf
    owner = torch.arange(40) % 9
    few, many = (torch.zeros(owners, 30, dtype=torch.float64) for owners in (9, 500))
    for total in (few, many):
        parts = [part.clone() for part in rows.split((10, 20), dim=1)]
        Clipping(kind, 0.3).add_clipped(total, parts, owner)
    assert torch.allclose(many[:9], few, rtol=1e-14, atol=0)
    assert few.abs().min() > 0 == many[9:].abs().max()
