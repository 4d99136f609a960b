"""Counts that one record moves by exactly 1, and an estimate that is as good as it says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2, norm

from fedlora.engine.batching import Shapes
from fedlora.engine.confusion import confusion_counts, confusion_layout, estimate_accuracy

LENGTHS = [5, 12, 3, 9, 12, 4, 7, 6]
EVERY = np.arange(len(LENGTHS))


class Sociable:
    """A back end whose predictions depend on company: on the batch's size and on how far it is padded."""

    def logits(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        ids = batch["input_ids"]
        lonely = len(ids) == 1 and bool(batch["attention_mask"].all())
        own = ids.sum(dim=1) % 3
        return torch.nn.functional.one_hot(own if lonely else (own + 1) % 3, 3).float()


class Broken:
    """A back end with logits that are no numbers."""

    def logits(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        return torch.full((len(batch["input_ids"]), 3), torch.nan)


@pytest.mark.parametrize("backend", ["expanded", "opacus"])
@pytest.mark.parametrize("head", ["prototype", "frozen", "trained"])
def test_counts_are_those_of_the_models_predictions(
    make_bench: Any, random_records: Any, head: str, backend: str
) -> None:
    bench = make_bench(f"model.head={head}", f"engine.backend={backend}", "data.task=mnli")
    dataset = random_records(LENGTHS, classes=3)
    if head == "prototype":
        bench.classifier.set_head(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(3))
    theta = bench.initial_theta + 0.1
    layout = confusion_layout(3)
    counts = layout.view(confusion_counts(bench.backend, dataset, EVERY, theta, layout, Shapes(512)), layout.slots[0])
    wanted = torch.zeros(3, 3, dtype=torch.float64)
    for record in EVERY:
        batch, (label,) = dataset.batch(np.array([record]))
        wanted[label, bench.backend.logits(theta, batch)[0].argmax()] += 1
    assert torch.equal(counts, wanted)
    assert not counts.requires_grad


@pytest.mark.parametrize("backend", [Sociable(), Broken()], ids=["sociable", "broken"])
def test_adding_or_removing_a_record_moves_one_cell_by_one(random_records: Any, backend: Any) -> None:
    """Also with a model that would predict a record otherwise in company, or whose logits are no numbers."""
    dataset, layout, theta = random_records(LENGTHS, classes=3), confusion_layout(3), torch.zeros(1)
    whole = confusion_counts(backend, dataset, EVERY, theta, layout, Shapes(512))
    assert whole.sum() == len(EVERY)
    for left_out in EVERY:
        rest = confusion_counts(backend, dataset, np.delete(EVERY, left_out), theta, layout, Shapes(512))
        assert sorted((whole - rest).tolist()) == [0.0] * 8 + [1.0]


def most_cells_moved(bench: Any, dataset: Any, shapes: Shapes) -> float:
    """Sum of what changes in all cells when any one record is left out, at most."""
    layout, theta = confusion_layout(3), bench.initial_theta + 0.1
    whole = confusion_counts(bench.backend, dataset, EVERY, theta, layout, shapes)
    rest = [confusion_counts(bench.backend, dataset, np.delete(EVERY, one), theta, layout, shapes) for one in EVERY]
    return max((whole - part).abs().sum().item() for part in rest)


@pytest.mark.parametrize("backend", ["expanded", "opacus"])
@pytest.mark.parametrize("head", ["prototype", "trained"])
def test_logits_that_show_their_company_are_taken_one_by_one(
    make_bench: Any, random_records: Any, monkeypatch: pytest.MonkeyPatch, backend: str, head: str
) -> None:
    """Seen though gradients show nothing, and under a head that makes all logits zero."""
    options = f"engine.backend={backend}", f"model.head={head}", "data.task=mnli"
    bench, dataset = make_bench(*options), random_records([9] * 8, classes=3)
    assert most_cells_moved(bench, dataset, bench.shapes) == 1
    assert bench.shapes.row_counts(16, 1, math.inf, quantity="logits") > (2,), "sound ones are taken together"
    genuine = type(bench.backend).logits

    def sociable(self: Any, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = genuine(self, theta, batch)
        return logits.roll(int(batch["input_ids"].sum()), dims=1)

    with monkeypatch.context() as patch:
        patch.setattr(type(bench.backend), "logits", sociable)
        bench = make_bench(*options)
        if head == "prototype":
            bench.classifier.set_head(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(3))
        assert most_cells_moved(bench, dataset, bench.shapes) == 1
        assert most_cells_moved(bench, dataset, Shapes(512)) > 1, "as it would be without a look"


def test_no_record_counts_nothing(random_records: Any) -> None:
    layout = confusion_layout(3)
    counts = confusion_counts(Broken(), random_records(LENGTHS), EVERY[:0], torch.zeros(1), layout, Shapes(512))  # type: ignore[arg-type]
    assert counts.tolist() == [0.0] * 9


# ----------------------------------------------------------------------------------------------------------- estimate


@pytest.mark.parametrize(
    ("accuracy", "classes", "noise_std"), [(0.8, 2, 30.0), (0.8, 2, 1.0), (0.55, 3, 20.0), (0.95, 3, 10.0)]
)
def test_the_estimate_is_unbiased_within_its_stated_error(accuracy: float, classes: int, noise_std: float) -> None:
    """Errors over the stated error have mean 0 and variance 1, up to what a ratio is biased by at N = 1500.

    Of 8,000 draws, false alarms 1e-6 each. An error 10 % too small or too large is rejected (asserted).
    """
    draws, total = 8_000, 1500
    random = np.random.default_rng(0)
    cells = np.full((classes, classes), (1 - accuracy) / (classes**2 - classes))
    np.fill_diagonal(cells, accuracy / classes)
    scores = np.empty(draws)
    for i, counts in enumerate(random.multinomial(total, cells.ravel(), size=draws)):
        noised = torch.from_numpy(counts + random.normal(size=counts.size) * noise_std).view(classes, classes)
        found = estimate_accuracy(noised, noise_std=noise_std, clients=3)
        assert found.accuracy is not None
        assert found.standard_error is not None
        scores[i] = (found.accuracy - accuracy) / found.standard_error
    bias = (noise_std * classes / total) * abs(accuracy - 1 / classes) * 2  # second order: times the error, at most
    assert abs(scores.mean()) <= norm.isf(5e-7) / math.sqrt(draws) + bias
    low, high = chi2.ppf(5e-7, draws) / draws, chi2.isf(5e-7, draws) / draws
    for scale, fits in ((1.0, True), (0.9, False), (1.1, False)):
        assert (low * 0.97 < scores.var() / scale**2 < high * 1.03) == fits


def test_without_noise_the_accuracy_is_that_of_the_counts() -> None:
    found = estimate_accuracy(torch.tensor([[30.0, 10.0], [20.0, 40.0]]).double(), noise_std=0.0, clients=2)
    assert found.accuracy == 0.7
    assert found.standard_error == pytest.approx(math.sqrt(0.7 * 0.3 / 100), rel=0.01)
    assert (found.clients, found.num_cells, found.noise_std, found.note) == (2, 4, 0.0, "")
    assert found.confusion == [[30.0, 10.0], [20.0, 40.0]]


def test_an_estimate_beyond_one_is_not_cut_off() -> None:
    found = estimate_accuracy(torch.tensor([[60.0, -9.0], [2.0, 60.0]]).double(), noise_std=5.0, clients=1)
    assert found.accuracy == pytest.approx(120 / 113)
    assert found.standard_error is not None
    assert found.standard_error > 0.05


@pytest.mark.parametrize("total", [-200.0, 0.0, 100.0])
def test_counts_that_noise_exceeds_are_said_to_be_no_measurement(total: float) -> None:
    found = estimate_accuracy(torch.full((2, 2), total / 4).double(), noise_std=10.0, clients=1)
    assert (found.accuracy, found.standard_error) == (None, None)
    assert found.note == (
        f"not measurable: noise σ·C·√clients = 20.0 on the number of held-out records, which came out as {total:.1f}, "
        "not above 5 times that"
    )
    assert estimate_accuracy(torch.full((2, 2), 25.1).double(), noise_std=10.0, clients=1).accuracy is not None


def test_noise_alone_is_no_measurement() -> None:
    random = np.random.default_rng(0)
    for _ in range(1000):
        noise = torch.from_numpy(random.normal(size=(3, 3)) * 17.0)
        assert estimate_accuracy(noise, noise_std=17.0, clients=3).accuracy is None


def test_nobody_measured_nothing() -> None:
    found = estimate_accuracy(torch.zeros(2, 2).double(), noise_std=0.0, clients=0)
    assert (found.accuracy, found.note) == (None, "not measurable: no client's answer arrived")
    nothing = estimate_accuracy(torch.zeros(2, 2).double(), noise_std=0.0, clients=3)
    assert (nothing.accuracy, nothing.note[:14]) == (None, "not measurable")
