"""The outer factors of fed_sb: every machine must derive the same, or an R from one means nothing to another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.adapters.methods.layout import Subspace, subspace
from fedlora.randomness import PublicSeed

SEED = PublicSeed.from_int(3)
KINDS: list[Subspace] = ["random", "weights"]


def weight(rows: int = 12, columns: int = 9) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_columns_and_rows_are_orthonormal(kind: Subspace, rank: int) -> None:
    outer, inner = subspace(SEED, "m", weight(), rank, kind)
    assert (outer.shape, inner.shape) == ((12, rank), (rank, 9))
    assert torch.allclose(outer.T @ outer, torch.eye(rank), atol=1e-5)
    assert torch.allclose(inner @ inner.T, torch.eye(rank), atol=1e-5)


def test_of_the_weight_they_are_its_leading_directions() -> None:
    outer, inner = subspace(SEED, "m", weight(), 3, "weights")
    core = outer.T @ weight() @ inner.T
    assert torch.allclose(core, torch.diag(torch.linalg.svdvals(weight())[:3]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_library_that_chooses_other_signs_changes_nothing(kind: Subspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """SVD and QR are unique but for signs, in which LAPACKs and accelerators differ."""
    wanted = subspace(SEED, "m", weight(), 4, kind)
    svd, qr = torch.linalg.svd, torch.linalg.qr
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0])

    def other_svd(*arguments: Any, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = svd(*arguments, **how)
        return left * flips, values, right * flips[:, None]

    def other_qr(columns: Tensor) -> tuple[Tensor, Tensor]:
        q, upper = qr(columns)
        own = flips[: len(upper)]
        return q * own, upper * own[:, None]

    monkeypatch.setattr(torch.linalg, "svd", other_svd)
    monkeypatch.setattr(torch.linalg, "qr", other_qr)
    for got, expected in zip(subspace(SEED, "m", weight(), 4, kind), wanted, strict=True):
        assert torch.equal(got, expected)


def test_random_ones_are_the_seeds_and_the_modules_own() -> None:
    first = subspace(SEED, "m", weight(), 4, "random")
    again = subspace(PublicSeed.from_int(3), "m", weight() + 1, 4, "random")
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for other in (
        subspace(SEED, "n", weight(), 4, "random"),
        subspace(PublicSeed.from_int(4), "m", weight(), 4, "random"),
    ):
        assert not torch.allclose(first[0], other[0])
        assert not torch.allclose(first[1], other[1])
