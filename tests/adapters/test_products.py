"""Products B A by their factors: what numpy makes of the whole product, without ever making it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora.adapters.methods.products import stacked, truncated

SHAPES = {"wide": (7, 40), "tall": (40, 7), "square": (23, 23), "inner above a side": (5, 60)}
SPLITS = ["orthonormal", "balanced"]


def factors(rows: int, columns: int, inner: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inner, generator=draw), torch.randn(inner, columns, generator=draw)


def best(product: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(product, full_matrices=False)
    found: np.ndarray = (left[:, :rank] * values[:rank]) @ right[:rank]
    return found


def whole(outer: Tensor, inner: Tensor) -> np.ndarray:
    return (outer.double() @ inner.double()).numpy()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("inner", [1, 4, 12])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_best_approximation_of_that_rank(shape: str, inner: int, rank: int, split: Any) -> None:
    outer, right = factors(*SHAPES[shape], inner)
    product = whole(outer, right)
    b, a = truncated(outer, right, rank, split)
    assert (b.shape, a.shape) == ((len(outer), rank), (rank, right.shape[1]))
    assert {b.dtype, a.dtype} == {torch.float32}
    wanted = best(product, rank)
    assert np.linalg.norm(whole(b, a) - wanted) <= 1e-5 * np.linalg.norm(product)
    if rank < min(inner, *product.shape):
        assert np.linalg.norm(wanted - product) > 1e-2 * np.linalg.norm(product), "something was cut"
    else:
        assert np.linalg.norm(whole(b, a) - product) <= 1e-5 * np.linalg.norm(product), "where the rank does, all of it"


@pytest.mark.parametrize("shape", SHAPES)
def test_where_the_singular_values_go(shape: str) -> None:
    outer, right = factors(*SHAPES[shape], 4)
    values = torch.from_numpy(np.linalg.svd(whole(outer, right))[1][:3])
    b, a = (part.double() for part in truncated(outer, right, 3, "orthonormal"))
    assert torch.allclose(a @ a.T, torch.eye(3, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(b.T @ b, torch.diag(values**2), rtol=1e-4, atol=1e-4 * float(values[0]) ** 2)
    b, a = (part.double() for part in truncated(outer, right, 3, "balanced"))
    for gram in (a @ a.T, b.T @ b):
        assert torch.allclose(gram, torch.diag(values), rtol=1e-4, atol=1e-4 * float(values[0]))
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-4)


@pytest.mark.parametrize("split", SPLITS)
def test_signs_do_not_depend_on_how_the_factors_came(split: Any) -> None:
    """A product has one pair of factors, whatever basis its own were written in and whoever computes it."""
    outer, right = factors(30, 20, 4)
    b, a = truncated(outer, right, 4, split)
    turned = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    for other in (truncated(outer @ turned, turned.T @ right, 4, split), truncated(-outer, -right, 4, split)):
        assert torch.allclose(b, other[0], atol=1e-4)
        assert torch.allclose(a, other[1], atol=1e-4)
    largest = a.gather(1, a.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()
    again = truncated(outer, right, 4, split)
    assert torch.equal(b, again[0])
    assert torch.equal(a, again[1])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("zero", ["outer", "inner", "both"])
def test_a_product_of_zero_has_finite_factors_of_zero(split: Any, zero: str) -> None:
    outer, right = factors(9, 11, 3)
    b, a = truncated(outer * (zero == "inner"), right * (zero == "outer"), 3, split)
    assert torch.isfinite(b).all()
    assert torch.isfinite(a).all()
    assert (b.double() @ a.double()).abs().max() < 1e-6


def test_what_is_beyond_the_inner_dimension_is_zero() -> None:
    b, a = truncated(*factors(9, 11, 2), 5, "orthonormal")
    assert (b[:, 2:] == 0).all()
    assert (a[2:] == 0).all()


def test_inputs_are_left_as_they_were() -> None:
    outer, right = factors(9, 11, 3)
    before = outer.clone(), right.clone()
    truncated(outer, right, 2, "balanced")
    stacked([outer], [right], [0.5])
    assert torch.equal(outer, before[0])
    assert torch.equal(right, before[1])


class LargestResult(TorchDispatchMode):
    """Watches how many numbers any tensor that is computed has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in _tensors(result):
            self.numbers = max(self.numbers, part.numel())
        return result


def _tensors(result: Any) -> Iterator[Tensor]:
    for part in result if isinstance(result, tuple | list) else [result]:
        if isinstance(part, Tensor):
            yield part


def test_the_whole_product_is_never_made() -> None:
    size, inner = 20_000, 24  # the product would have 400 million numbers
    outers, inners = zip(*(factors(size, size, inner // 3, seed) for seed in range(3)), strict=True)
    with LargestResult() as seen:
        b, a = truncated(*stacked(outers, inners, [0.2, 0.3, 0.5]), 8, "balanced")
    assert inner * size <= seen.numbers <= 2 * inner * size
    probe = torch.randn(size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    parts = zip(outers, inners, (0.2, 0.3, 0.5), strict=True)
    product = sum(weight * (outer.double() @ (inner.double() @ probe)) for outer, inner, weight in parts)
    assert 0 < (b.double() @ (a.double() @ probe)).norm() < product.norm()  # type: ignore[union-attr]


@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 1, 2), (3,)])
def test_stacked_factors_have_the_weighted_sum_of_products(ranks: tuple[int, ...]) -> None:
    outers, inners = zip(*(factors(13, 17, rank, seed) for seed, rank in enumerate(ranks)), strict=True)
    weights = [0.5, 0.3, 0.2][: len(ranks)]
    outer, inner = stacked(outers, inners, weights)
    assert (outer.shape, inner.shape) == ((13, sum(ranks)), (sum(ranks), 17))
    assert {outer.dtype, inner.dtype} == {torch.float64}
    wanted = sum(weight * whole(b, a) for weight, b, a in zip(weights, outers, inners, strict=True))
    assert np.allclose((outer @ inner).numpy(), wanted, atol=1e-12)


def test_stacked_refuses_what_does_not_belong_together() -> None:
    outer, inner = factors(5, 6, 2)
    with pytest.raises(ValueError, match="shorter"):
        stacked([outer, outer], [inner, inner], [1.0])
