from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from fedlora.adapters.dam import Candidate, UpdateProducts
from fedlora.adapters.slots import AdapterLayout
from fedlora.errors import AdapterError

Candidates = tuple[Candidate, ...]
RANK = 2


def layout_of(candidates: Candidates) -> AdapterLayout:
    """A head before and after the modules, which lie in another order than the candidates."""
    shapes: dict[str, tuple[int, ...]] = {"head:out/weight": (3, 4)}
    shapes |= {f"{candidate.module}/B": (candidate.out_features, RANK) for candidate in reversed(candidates)}
    shapes["head:out/bias"] = (3,)
    return AdapterLayout.build(shapes, method="ffa", rank=RANK, alpha=4.0)


def updates_of(layout: AdapterLayout, count: int) -> Tensor:
    return torch.randn(count, layout.size, generator=torch.Generator().manual_seed(0))


def products_of(candidates: Candidates, updates: Tensor) -> UpdateProducts:
    products = UpdateProducts.empty(layout_of(candidates), candidates)
    for update in updates:
        products.add(update)
    return products


def test_signal_is_the_mean_product_of_different_updates_by_module(candidates: Candidates) -> None:
    layout = layout_of(candidates)
    updates = updates_of(layout, 5)
    named = {slot.name: layout.view(updates.double(), slot).flatten(1) for slot in layout.slots}
    wanted = []
    for candidate in candidates:
        part = named[f"{candidate.module}/B"]
        pairs = [float(part[i] @ part[j]) for i, j in itertools.permutations(range(5), 2)]
        wanted.append(sum(pairs) / len(pairs))
    found = products_of(candidates, updates).signal()
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert (found < 0).any()
    assert (found > 0).any()


def test_noise_adds_nothing_to_the_signal_on_average(candidates: Candidates) -> None:
    """8 updates with noise s = 1, 400 times. By module of d numbers the estimate's variance is 4|mean|²s²/8 + 2ds⁴/56.

    The bound is 6 standard errors: for 12 modules a false alarm of 3e-8, means over 400 being close to normal. With its
    noise left in, |mean y|² would be high by d/8, at least 21 standard errors.
    """
    layout = layout_of(candidates)
    generator = torch.Generator().manual_seed(0)
    strengths = {candidate.module: 0.1 * index for index, candidate in enumerate(candidates)}
    mean = torch.zeros(layout.size)
    for candidate, slot in zip(candidates, UpdateProducts.empty(layout, candidates).slots, strict=True):
        mean[slot.offset : slot.offset + slot.size] = strengths[candidate.module] / slot.size**0.5
    trials, count = 400, 8
    estimates = torch.stack(
        [
            products_of(candidates, mean + torch.randn(count, layout.size, generator=generator)).signal()
            for _ in range(trials)
        ]
    )
    energy = torch.tensor([strengths[candidate.module] ** 2 for candidate in candidates], dtype=torch.float64)
    numbers = torch.tensor([candidate.out_features * RANK for candidate in candidates], dtype=torch.float64)
    variance = 4 * energy / count + 2 * numbers / (count * (count - 1))
    bound = 6 * (variance / trials).sqrt()
    assert ((estimates.mean(0) - energy).abs() < bound).all()
    assert (numbers / count > 3 * bound).all()


def test_noise_to_signal_is_that_of_the_mean_over_the_clients(candidates: Candidates) -> None:
    """Of updates u + e and u - e with <u, e> = 0: S = |u|² - |e|², T = |u|² + |e|², noise 2|e|²."""
    layout = layout_of(candidates)
    slots = UpdateProducts.empty(layout, candidates).slots
    signal, noise = torch.zeros(layout.size), torch.zeros(layout.size)
    signal[slots[0].offset], signal[slots[7].offset] = 3.0, 4.0
    noise[slots[3].offset] = 2.0
    signal[0] = noise[-1] = 100.0  # the head's, which counts for nothing
    products = products_of(candidates, torch.stack([signal + noise, signal - noise]))
    assert products.signal().tolist() == [9, 0, 0, -4, 0, 0, 0, 16, 0, 0, 0, 0]
    assert products.noise_to_signal(1) == pytest.approx(8 / 21)
    assert products.noise_to_signal(4) == pytest.approx(2 / 21)


def test_equal_updates_have_no_noise_and_opposite_ones_no_signal(candidates: Candidates) -> None:
    update = updates_of(layout_of(candidates), 1)
    assert products_of(candidates, update.expand(3, -1)).noise_to_signal(2) == pytest.approx(0, abs=1e-12)
    assert products_of(candidates, torch.cat([update, -update])).noise_to_signal(2) == math.inf
    assert products_of(candidates, torch.zeros_like(update).expand(3, -1)).noise_to_signal(2) == math.inf


def test_sums_are_those_of_doubles(candidates: Candidates) -> None:
    """In float32 a large common part would swallow the products."""
    layout = layout_of(candidates)
    products = products_of(
        candidates, torch.cat([torch.full((1, layout.size), 1e4), torch.full((64, layout.size), 1e-4)])
    )
    wanted = (2 * 64 * 1.0 + 64 * 63 * 1e-8) / (65 * 64) * torch.tensor([c.out_features * RANK for c in candidates])
    torch.testing.assert_close(products.signal(), wanted.double(), rtol=1e-6, atol=0)


def test_a_saved_state_goes_on(candidates: Candidates) -> None:
    layout = layout_of(candidates)
    updates = updates_of(layout, 4)
    before = products_of(candidates, updates[:2])
    saved = {"total": before.total.clone(), "squares": before.squares.clone()}
    after = dataclasses.replace(UpdateProducts.empty(layout, candidates), count=before.count, **saved)
    for update in updates[2:]:
        after.add(update)
    assert torch.equal(after.signal(), products_of(candidates, updates).signal())
    assert torch.equal(before.total, saved["total"])


def test_a_state_of_another_layout_is_refused(candidates: Candidates) -> None:
    products = UpdateProducts.empty(layout_of(candidates), candidates)
    with pytest.raises(AdapterError, match="another layout"):
        dataclasses.replace(products, squares=torch.zeros(11, dtype=torch.float64))
    with pytest.raises(AdapterError, match="another layout"):
        dataclasses.replace(products, total=torch.zeros(10, dtype=torch.float64))


@pytest.mark.parametrize("count", [0, 1])
def test_one_update_has_no_products(candidates: Candidates, count: int) -> None:
    products = products_of(candidates, updates_of(layout_of(candidates), count))
    with pytest.raises(AdapterError, match=f"at least 2, got {count}"):
        products.signal()
    with pytest.raises(AdapterError, match=f"at least 2, got {count}"):
        products.noise_to_signal(1)


def test_an_update_of_another_shape_is_refused(candidates: Candidates) -> None:
    products = UpdateProducts.empty(layout_of(candidates), candidates)
    for wrong in (torch.zeros(3), torch.zeros(2, len(products.total))):
        with pytest.raises(AdapterError, match="an update of shape"):
            products.add(wrong)
    assert products.count == 0


def test_no_mean_over_no_clients(candidates: Candidates) -> None:
    with pytest.raises(AdapterError, match="the mean of 0 updates"):
        products_of(candidates, updates_of(layout_of(candidates), 2)).noise_to_signal(0)


def test_a_layout_has_to_adapt_every_candidate(candidates: Candidates) -> None:
    with pytest.raises(AdapterError, match=r"slot encoder.layer.1.query/B: got none, wanted \(4, 2\)"):
        UpdateProducts.empty(layout_of(candidates[:6]), candidates)
    narrow = dataclasses.replace(candidates[0], out_features=8)
    with pytest.raises(AdapterError, match=r"got \(4, 2\), wanted \(8, 2\)"):
        UpdateProducts.empty(layout_of(candidates), (narrow,))


def test_the_deviation_of_the_signal_is_that_of_repeated_draws(candidates: Candidates) -> None:
    """Over 2,000 draws of 6 updates; the standard deviation found has an error of 1.6 %, so 10 % are six of them."""
    layout, generator = layout_of(candidates), torch.Generator().manual_seed(1)
    mean = torch.randn(layout.size, generator=generator)
    signals, variances = [], []
    for _ in range(2000):
        drawn = products_of(candidates, mean + 1.5 * torch.randn(6, layout.size, generator=generator))
        signals.append(drawn.signal())
        variances.append(drawn.deviation().square())
    found, estimated = torch.stack(signals).std(dim=0), torch.stack(variances).mean(dim=0).sqrt()
    assert (estimated / found - 1).abs().max() < 0.1
