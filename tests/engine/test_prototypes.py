"""The prototype release: what a record can move it by, and the head that is made of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config import ModelConfig
from fedlora.data.tasks import TASKS
from fedlora.engine.batching import Shapes
from fedlora.engine.prototypes import LARGEST_LOGIT, class_sums, prototype_head, prototype_layout
from fedlora.errors import ConfigError
from fedlora.federation.workbench import Workbench

LENGTHS = [5, 12, 3, 9, 12, 4, 7, 6]


@pytest.fixture(scope="module")
def bench(make_bench: Any) -> Workbench:
    return make_bench("model.head=prototype")


def test_sums_and_counts_are_those_of_normalised_embeddings(bench: Workbench, random_records: Any) -> None:
    dataset, layout = random_records(LENGTHS, classes=2), prototype_layout(2, 16)
    sums, counts = (
        layout.view(class_sums(bench.classifier, dataset, np.arange(8), layout, Shapes(20)), s) for s in layout.slots
    )
    for label in (0, 1):
        own = np.flatnonzero(dataset.labels == label)
        assert counts[label] == len(own) > 0
        embeddings = torch.cat([bench.classifier.embed(dataset.batch(np.array([i]))[0]) for i in own])
        assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(own)), atol=1e-5)
        assert torch.allclose(sums[label], embeddings.double().sum(dim=0), atol=1e-5)


def test_adding_or_removing_a_record_moves_the_release_by_at_most_root_two(
    bench: Workbench, random_records: Any
) -> None:
    dataset, layout = random_records(LENGTHS), prototype_layout(2, 16)
    whole = class_sums(bench.classifier, dataset, np.arange(8), layout, Shapes(1000)).double()
    for left_out in range(8):
        rest = np.delete(np.arange(8), left_out)
        moved = (whole - class_sums(bench.classifier, dataset, rest, layout, Shapes(1000)).double()).norm()
        assert moved == pytest.approx(math.sqrt(2), abs=1e-6)
        assert moved <= math.sqrt(2) * (1 + 1e-12), "exact sums: nothing is lost or gained by rounding"


def test_a_single_record_never_weighs_more_than_root_two(bench: Workbench, random_records: Any) -> None:
    layout = prototype_layout(2, 16)
    for seed in range(20):
        dataset = random_records([4 + seed % 9], seed=seed)
        total = class_sums(bench.classifier, dataset, np.arange(1), layout, Shapes(1000)).double()
        assert total.norm() <= math.sqrt(2) * (1 + 1e-6)


def test_an_embedding_that_is_too_long_or_no_number_is_kept_in_bounds(
    bench: Workbench, random_records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, layout = random_records([4] * 4), prototype_layout(2, 16)
    broken = torch.eye(4, 16)
    broken[0] *= 1e6
    broken[1] = torch.nan
    broken[2, 3] = torch.inf
    monkeypatch.setattr(type(bench.classifier), "embed", lambda self, batch: broken)
    total = class_sums(bench.classifier, dataset, np.arange(4), layout, Shapes(1000))
    sums, counts = (layout.view(total, slot) for slot in layout.slots)
    assert torch.isfinite(total).all()
    assert counts.sum() == 2
    assert sums.sum() == pytest.approx(2.0)


def largest_move(bench: Workbench, dataset: Any, shapes: Shapes) -> float:
    """How far the sums go when any one of eight records is left out."""
    every, layout = np.arange(8), prototype_layout(2, 16)
    whole = class_sums(bench.classifier, dataset, every, layout, shapes)
    rest = [class_sums(bench.classifier, dataset, np.delete(every, one), layout, shapes) for one in every]
    return max(float((whole - part).norm()) for part in rest)


def test_embeddings_that_show_their_company_are_taken_one_by_one(
    make_bench: Any, random_records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else leaving one record out moves the embeddings of all others, and more than the noise is made for."""
    bench, dataset = make_bench("model.head=prototype"), random_records([9] * 8)
    genuine = type(bench.classifier).embed

    def sociable(self: Any, batch: Any) -> torch.Tensor:
        embeddings: torch.Tensor = genuine(self, batch)
        return torch.nn.functional.normalize(embeddings + torch.randn(16, generator=of_all(batch)))

    def of_all(batch: Any) -> torch.Generator:
        return torch.Generator().manual_seed(int(batch["input_ids"].sum()))

    bound = math.sqrt(2) * (1 + 1e-12)
    assert largest_move(bench, dataset, bench.shapes) <= bound
    assert bench.shapes.row_counts(16, 1, math.inf, quantity="embeddings") > (2,), "sound ones are taken together"
    monkeypatch.setattr(type(bench.classifier), "embed", sociable)
    bench = make_bench("model.head=prototype")
    assert largest_move(bench, dataset, bench.shapes) <= bound
    assert largest_move(bench, dataset, Shapes(bench.shapes.token_budget)) > 2 * bound, "as it would be without a look"


def test_the_norm_of_an_embedding_is_taken_in_a_shape_that_no_record_decides(
    bench: Workbench, random_records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reduction too may sum in another order where there are fewer rows, or where one is no number."""
    genuine = torch.Tensor.norm

    def shaped(tensor: torch.Tensor, *arguments: Any, **how: Any) -> torch.Tensor:
        found: torch.Tensor = genuine(tensor, *arguments, **how)
        return found + len(tensor) if tensor.dim() == 2 else found

    monkeypatch.setattr(torch.Tensor, "norm", shaped)
    whole, layout = random_records([9] * 8), prototype_layout(2, 16)
    moved = largest_move(bench, whole, Shapes(1000))
    alone = class_sums(bench.classifier, whole, np.arange(1), layout, Shapes(1000)).norm().item()
    assert moved == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("token_budget", [1, 20, 10_000])
def test_micro_batches_change_nothing(bench: Workbench, random_records: Any, token_budget: int) -> None:
    dataset, layout = random_records(LENGTHS), prototype_layout(2, 16)
    wanted = class_sums(bench.classifier, dataset, np.arange(8), layout, Shapes(50))
    got = class_sums(bench.classifier, dataset, np.arange(8)[::-1].copy(), layout, Shapes(token_budget))
    assert torch.allclose(got, wanted, atol=1e-5)


def test_only_the_sites_own_records_are_read(bench: Workbench, random_records: Any) -> None:
    dataset, layout = random_records(LENGTHS), prototype_layout(2, 16)
    own = np.array([1, 4, 6])
    before = class_sums(bench.classifier, dataset, own, layout, Shapes(50))
    other = dataclasses.replace(dataset, labels=1 - dataset.labels)
    other.labels[own] = dataset.labels[own]
    assert torch.equal(class_sums(bench.classifier, other, own, layout, Shapes(50)), before)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 4), st.floats(0.5, 50.0))
def test_the_head_is_the_gaussian_classifier_of_the_class_means(seed: int, classes: int, temperature: float) -> None:
    layout, draw = prototype_layout(classes, 6), torch.Generator().manual_seed(seed)
    sums = torch.randn(classes, 6, generator=draw) * 10
    counts = torch.rand(classes, generator=draw) * 100 + 1
    weight, bias = prototype_head(torch.cat([sums.flatten(), counts]), layout, temperature)
    means = (sums / counts.unsqueeze(1)).double()
    means /= means.norm(dim=1, keepdim=True).clamp(min=1.0)
    spread = (means - means.mean(dim=0)).norm(dim=1).mean()
    points = torch.randn(5, 6, generator=draw).double()
    distances = (points.unsqueeze(1) - means).square().sum(dim=2)
    wanted = counts.double().log() - temperature / (2 * spread) * distances
    got = points @ weight.T.double() + bias.double()
    assert torch.allclose(got.log_softmax(1), wanted.log_softmax(1), atol=1e-3, rtol=1e-3)


def test_a_head_of_hopeless_noise_is_still_finite() -> None:
    layout = prototype_layout(3, 5)
    for released in (torch.zeros(layout.size), -1e3 * torch.ones(layout.size)):
        weight, bias = prototype_head(released, layout, 20.0)
        assert torch.isfinite(weight).all()
        assert torch.isfinite(bias).all()


MOST_CLASSES = max(task.num_labels for task in TASKS.values())


@settings(max_examples=300)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(2, MOST_CLASSES),
    log_noise=st.floats(-6.0, 6.0),
    log_records=st.floats(0.0, 4.0),
    temperature=st.floats(1e-3, 500.0),
)
def test_no_noise_makes_a_head_that_a_site_would_refuse(
    seed: int, classes: int, log_noise: float, log_records: float, temperature: float
) -> None:
    layout, draw = prototype_layout(classes, 384), torch.Generator().manual_seed(seed)
    counts = 10**log_records * torch.rand(classes, generator=draw)
    exact = torch.cat([(torch.randn(classes, 384, generator=draw) * 0.05 * counts.unsqueeze(1)).flatten(), counts])
    released = exact + 10**log_noise * torch.randn(layout.size, generator=draw)
    bound = temperature * classes / 2 + 89
    for part in prototype_head(released, layout, temperature):
        assert part.abs().max() <= bound * 1.1 < LARGEST_LOGIT


def test_the_largest_temperature_is_the_one_that_the_bound_on_heads_is_made_for() -> None:
    with pytest.raises(ConfigError, match=r"model\.temperature = 500\.001, wanted > 0 and <= 500"):
        ModelConfig(temperature=500.001)
    layout = prototype_layout(MOST_CLASSES, 5)
    for counts in (torch.tensor([3e38, 0, 0]), torch.tensor([0, 3e38, -3e38])):
        released = torch.cat([torch.eye(3, 5).flatten() * 3e38, counts])
        for part in prototype_head(released, layout, ModelConfig(temperature=500.0).temperature):
            assert part.abs().max() <= LARGEST_LOGIT


def test_class_means_within_the_unit_ball_are_taken_bit_for_bit_and_others_put_on_its_surface() -> None:
    layout, draw = prototype_layout(2, 6), torch.Generator().manual_seed(1)
    counts = torch.tensor([1000.0, 700.0])
    means = torch.nn.functional.normalize(torch.randn(2, 6, generator=draw))
    near, far = (torch.cat([(scale * means * counts.unsqueeze(1)).flatten(), counts]) for scale in (0.999, 7.0))
    exact = layout.view(near, layout.slots[0]) / counts.unsqueeze(1)
    offsets = exact - exact.mean(dim=0)
    assert torch.equal(prototype_head(near, layout, 10.0)[0], 10.0 / offsets.norm(dim=1).mean() * offsets)
    surface = torch.cat([(means * counts.unsqueeze(1)).flatten(), counts])
    for got, wanted in zip(prototype_head(far, layout, 10.0), prototype_head(surface, layout, 10.0), strict=True):
        assert torch.allclose(got, wanted, atol=1e-4)
