"""Scores of modules on public text: what a loop over records and labels finds, whatever the batching."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.adapters.methods import layout as layouts
from fedlora.adapters.slots import AdapterLayout
from fedlora.data.encode import EncodedDataset
from fedlora.engine import probe
from fedlora.engine.probe import ProbeScores, probe_scores
from fedlora.errors import AdapterError, DataError, ModelError
from fedlora.federation.workbench import Workbench
from fedlora.randomness import PublicSeed

ALL = "adapter.target_modules=all"
LENGTHS = [5, 12, 3, 9, 12, 4, 7]
TEN_MODULES = [f"m{number}" for number in range(10)]


def candidates(bench: Workbench) -> list[str]:
    return [*bench.classifier.target_modules(bench.config.adapter.targets)]


def scored(bench: Workbench, dataset: EncodedDataset, token_budget: int = 40, **changes: Any) -> ProbeScores:
    given = {"layout": bench.layout, "modules": candidates(bench), "num_labels": bench.classifier.num_labels}
    theta = changes.pop("theta", bench.initial_theta)
    return probe_scores(bench.backend, dataset, theta, token_budget=token_budget, **{**given, **changes})


def numbers(scores: ProbeScores) -> Tensor:
    return torch.stack([scores.trace, scores.lambda_min, scores.effective_rank])


def grams_of_a_loop(bench: Workbench, dataset: EncodedDataset) -> dict[str, np.ndarray]:
    """K_m from gradients of whole weights, one unpadded record and label at a time: dL/dB = alpha/r dL/dW Aᵀ."""
    linears = bench.classifier.target_modules(bench.config.adapter.targets)
    weights = [module.weight.requires_grad_() for module in linears.values()]
    rank, seed = bench.config.adapter.rank, PublicSeed.from_int(bench.config.run.seed)
    factors = {path: layouts.frozen_factor(seed, path, rank, module.in_features) for path, module in linears.items()}
    classes = bench.classifier.num_labels
    gradients: dict[str, list[list[np.ndarray]]] = {path: [] for path in linears}
    for label in range(max(2, classes)):
        for rows in gradients.values():
            rows.append([])
        for record in range(len(dataset)):
            logits = bench.classifier(dataset.batch(np.array([record]))[0])[0]
            loss = -logits.log_softmax(0)[label] if classes > 1 else (logits[0] - label) ** 2
            for (path, rows), found in zip(gradients.items(), torch.autograd.grad(loss, weights), strict=True):
                rows[-1].append((bench.layout.scale * found @ factors[path].T).flatten().double().numpy())
    for weight in weights:
        weight.requires_grad_(False)
    return {
        path: np.mean([np.array(rows) @ np.array(rows).T for rows in by_label], axis=0) / len(dataset)
        for path, by_label in gradients.items()
    }


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.task=sst2"],
        ["data.task=mnli"],
        ["data.task=stsb"],
        ["model.head=trained"],
        ["engine.backend=opacus"],
        ["data.task=stsb", "engine.backend=opacus"],
    ],
    ids=" ".join,
)
def test_scores_are_those_of_a_loop_over_records_and_labels(
    make_bench: Any, random_records: Any, overrides: list[str]
) -> None:
    bench, dataset = make_bench(ALL, *overrides), random_records(LENGTHS)
    scores, grams = scored(bench, dataset), grams_of_a_loop(bench, dataset)
    assert len(grams) == len(scores.trace) == 12
    for position, gram in enumerate(grams.values()):
        eigenvalues = np.linalg.eigvalsh(gram)
        shares = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
        assert scores.trace[position] == pytest.approx(np.trace(gram), rel=1e-4)
        assert scores.lambda_min[position] == pytest.approx(eigenvalues[0], rel=1e-4, abs=1e-6 * np.trace(gram))
        assert scores.effective_rank[position] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def test_the_order_asked_for_is_the_order_given(make_bench: Any, random_records: Any) -> None:
    bench, dataset = make_bench(ALL), random_records(LENGTHS)
    backwards = candidates(bench)[::-1]
    assert torch.equal(numbers(scored(bench, dataset, modules=backwards)).flip(1), numbers(scored(bench, dataset)))
    some = scored(bench, dataset, modules=backwards[2:5])
    assert torch.equal(numbers(some).flip(1), numbers(scored(bench, dataset))[:, 7:10])


def test_labels_are_not_looked_at(make_bench: Any, random_records: Any) -> None:
    bench, dataset = make_bench(ALL), random_records(LENGTHS)
    other = dataclasses.replace(dataset, labels=1 - dataset.labels)
    assert torch.equal(numbers(scored(bench, dataset)), numbers(scored(bench, other)))


@pytest.mark.usefixtures("untouched_global_generator")
def test_the_same_again(make_bench: Any, random_records: Any) -> None:
    first, again = (numbers(scored(make_bench(ALL), random_records(LENGTHS))) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("token_budget", [1, 25, 10_000])
def test_batching_changes_rounding_only(make_bench: Any, random_records: Any, token_budget: int) -> None:
    bench, dataset = make_bench(ALL), random_records(LENGTHS)
    wanted = scored(bench, dataset)
    got = scored(bench, dataset, token_budget)
    assert torch.allclose(got.trace, wanted.trace, rtol=1e-4)
    assert torch.allclose(got.effective_rank, wanted.effective_rank, rtol=1e-4)
    assert ((got.lambda_min - wanted.lambda_min).abs() <= 1e-5 * wanted.trace).all()


def test_the_trace_grows_with_the_square_of_the_adapters_scale(make_bench: Any, random_records: Any) -> None:
    dataset = random_records(LENGTHS)
    plain, doubled = (scored(make_bench(ALL, f"adapter.alpha={alpha}"), dataset) for alpha in (8, 16))
    assert torch.allclose(doubled.trace, 4 * plain.trace, rtol=1e-4)
    assert torch.allclose(doubled.effective_rank, plain.effective_rank, rtol=1e-4)


def test_equal_texts_pull_in_one_direction(make_bench: Any, random_records: Any) -> None:
    dataset = random_records([9]).subset(np.zeros(6, np.int64))
    scores = scored(make_bench(ALL), dataset)
    assert (scores.trace > 0).all()
    assert (scores.lambda_min <= 1e-6 * scores.trace).all()
    assert torch.allclose(scores.effective_rank, torch.ones(12, dtype=torch.float64), atol=1e-3)


# --- on gradients that are known -------------------------------------------------------------------------------------


@pytest.fixture
def score_table(table_backend: Any) -> Callable[..., tuple[ProbeScores, Any]]:
    """`score_table(table, widths)` scores modules whose slots have those widths and the gradients of `table` [n, P]."""

    def score(table: Tensor, widths: tuple[int, ...]) -> tuple[ProbeScores, Any]:
        backend = table_backend(table, widths)
        names = TEN_MODULES[: len(widths)]
        layout = AdapterLayout.build(
            {f"{name}/B": (width,) for name, width in zip(names, widths, strict=True)}, method="ffa", rank=1, alpha=1.0
        )
        theta = torch.zeros(layout.size)
        scores = probe_scores(
            backend, backend.dataset, theta, layout=layout, modules=names, num_labels=2, token_budget=4
        )
        return scores, backend

    return score


def test_orthogonal_gradients_of_length_three(score_table: Any) -> None:
    scores, _ = score_table(3 * torch.eye(5), (5,))
    assert scores.trace.tolist() == pytest.approx([9.0])
    assert scores.lambda_min.tolist() == pytest.approx([9.0 / 5])
    assert scores.effective_rank.tolist() == pytest.approx([5.0])


def test_two_directions_of_unequal_weight(score_table: Any) -> None:
    table = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    scores, _ = score_table(table, (2,))
    assert scores.trace.tolist() == pytest.approx([10 / 3])
    assert scores.lambda_min.tolist() == [0.0]
    assert scores.effective_rank.tolist() == pytest.approx([math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))])


def test_a_module_without_any_pull_has_no_rank(score_table: Any) -> None:
    scores, _ = score_table(torch.cat([torch.zeros(4, 3), torch.eye(4)], dim=1), (3, 4))
    assert numbers(scores)[:, 0].tolist() == [0.0, 0.0, 0.0]
    assert numbers(scores)[:, 1].tolist() == pytest.approx([1.0, 0.25, 4.0])


@pytest.mark.parametrize(("modules_held", "passes"), [(100, 1), (6, 2), (4, 3), (1, 10)])
def test_little_memory_costs_passes_and_changes_nothing(
    score_table: Any, monkeypatch: pytest.MonkeyPatch, modules_held: int, passes: int
) -> None:
    table = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    wanted, _ = score_table(table, (3,) * 10)
    monkeypatch.setattr(probe, "_BYTES_HELD", 4 * len(table) * 3 * modules_held)
    got, backend = score_table(table, (3,) * 10)
    assert torch.equal(numbers(got), numbers(wanted))
    asked = [record for records, _ in backend.asked for record in records]
    assert sorted(asked) == sorted([*range(8)] * 2 * passes), "two labels in each pass"


def test_slots_of_unequal_size_beyond_the_bound_go_one_by_one(
    score_table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    wanted, _ = score_table(table, (2, 7, 1, 2))
    monkeypatch.setattr(probe, "_BYTES_HELD", 4 * len(table) * 3)
    got, backend = score_table(table, (2, 7, 1, 2))  # runs: 2 | 7 | 1 + 2
    assert torch.equal(numbers(got), numbers(wanted))
    assert sum(len(records) for records, _ in backend.asked) == 3 * 2 * 4


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_head_that_is_not_set_is_an_error_and_one_that_is_set_is_not(make_bench: Any, random_records: Any) -> None:
    bench, dataset = make_bench(ALL, "model.head=prototype"), random_records(LENGTHS)
    with pytest.raises(AdapterError, match=r"all gradients are zero.*after the head was made"):
        scored(bench, dataset)
    bench.classifier.set_head(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(2))
    assert (scored(bench, dataset).trace > 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_no_numbers_are_an_error(score_table: Any, bad: float) -> None:
    table = torch.eye(4)
    table[2, 1] = bad
    with pytest.raises(ModelError, match=r"not finite.*model\.dtype=float32"):
        score_table(table, (4,))


def test_unknown_modules_and_single_texts_are_refused(make_bench: Any, random_records: Any) -> None:
    bench = make_bench()
    absent = "encoder.layer.0.attention.self.key"
    with pytest.raises(AdapterError, match=rf"1 of 5 modules to be scored have no slot, such as {absent}"):
        scored(bench, random_records(LENGTHS), modules=[*candidates(bench), absent])
    with pytest.raises(AdapterError, match="0 of 0 modules"):
        scored(bench, random_records(LENGTHS), modules=[])
    with pytest.raises(DataError, match=r"1 public texts .* at least 2"):
        scored(bench, random_records([5]))
