"""No record can tell in another's gradient: bit for bit, through the shapes that `train` uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.engine import company
from fedlora.engine.batching import fixed_shapes
from fedlora.engine.company import check_company
from fedlora.engine.training import TrainingJob, train
from fedlora.errors import PrivacyError
from fedlora.privacy.noise import HostNoise
from fedlora.randomness import SecretRoot

FAMILIES = ["bert", "roberta", "distilbert", "electra", "deberta-v2", "llama"]
CPU = torch.device("cpu")


def shape_of(lengths: list[int], record: int, budget: int) -> tuple[int, int]:
    cut = fixed_shapes(np.array(lengths), budget, 130)
    return next((group.rows, group.columns) for group in cut if record in group.positions)


@pytest.mark.parametrize("budget", [1, 64, 512])
def test_a_records_shape_is_its_own(budget: int) -> None:
    draw = np.random.default_rng(0)
    for length in (0, 1, 7, 8, 9, 40, 128, 130):
        alone = shape_of([length], 0, budget)
        for _ in range(20):
            company = draw.integers(1, 130, draw.integers(1, 200)).tolist()
            assert shape_of([*company, length], len(company), budget) == alone


def test_no_shape_is_longer_than_the_model_takes_nor_empty() -> None:
    """A record of no token, and one as long as a model whose positions are no multiple of eight."""
    assert shape_of([0, 30], 0, 64) == (8, 8)
    shapes = [(group.rows, group.columns) for group in fixed_shapes(np.array([30, 29, 3]), 64, 30)]
    assert shapes == [(2, 30), (2, 30), (8, 8)]


def test_every_record_is_in_one_micro_batch_that_keeps_a_row_for_a_dummy() -> None:
    lengths = np.random.default_rng(1).integers(1, 130, 500)
    groups = list(fixed_shapes(lengths, 512, 130))
    assert sorted(np.concatenate([group.positions for group in groups]).tolist()) == list(range(500))
    for group in groups:
        assert len(group.positions) < group.rows
        assert lengths[group.positions].max() <= group.columns
        assert lengths[group.positions].min() > group.columns - 8
    assert list(fixed_shapes(np.array([], dtype=np.int64), 512, 130)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_check_here(make_bench: Any, family: str, dtype: str) -> None:
    make_bench("model.head=trained", f"model.dtype={dtype}", "privacy.seeded_noise=false", family=family)


class Gossip:
    """A back end whose gradients carry a trace of the whole micro-batch."""

    fuses_clients = True
    slot_sizes = (3,)

    def gradients(self, theta: Tensor, batch: Any, labels: Tensor, owner: Tensor) -> list[Tensor]:
        ids = batch["input_ids"].float()
        return [ids[:, :3] + 1e-6 * ids.sum()]

    def logits(self, theta: Tensor, batch: Any) -> Tensor:
        raise NotImplementedError


def test_a_trace_of_the_others_is_found_and_one_by_one_is_the_way_out() -> None:
    found: dict[str, Any] = {"vocabulary": 50, "num_labels": 2, "longest": 512, "device": CPU}
    with pytest.raises(PrivacyError, match=r"engine\.token_budget=1"):
        check_company(Gossip(), token_budget=512, **found)
    check_company(Gossip(), token_budget=1, **found)


def test_a_workbench_is_not_built_where_records_influence_one_another(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(company, "_gradient", lambda *arguments: torch.rand(3))
    with pytest.raises(PrivacyError, match="depends on the records beside it"):
        make_bench()
    make_bench("privacy.epsilon=inf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_long_record_more_changes_nothing_in_what_the_others_add(
    make_bench: Any, random_records: Any, make_phase: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `train`: with the added record's own part taken out, the sums are equal in float64 to the last bits."""
    bench = make_bench("model.head=trained", f"model.dtype={dtype}")
    data = random_records([5, 6, 7, 9, 12, 12, 14, 3, 16])
    phase = make_phase(1.0, 0.0, 0.01)
    seen: list[dict[int, Tensor]] = []
    genuine = type(bench.backend).gradients

    def spy(backend: Any, theta: Tensor, batch: Any, labels: Tensor, owner: Tensor) -> list[Tensor]:
        parts = genuine(backend, theta, batch, labels, owner)
        for row, ids in enumerate(batch["input_ids"]):
            seen[-1][hash(tuple(ids[batch["attention_mask"][row].bool()].tolist()))] = torch.cat(
                [p[row] for p in parts]
            )
        return parts

    monkeypatch.setattr(type(bench.backend), "gradients", spy)
    for count in (8, 9):
        seen.append({})
        stream = SecretRoot.seeded(0)
        job = TrainingJob(
            records=np.arange(count), phase=phase, sampling=stream.numpy("s"), noise=HostNoise(stream.numpy("n"))
        )
        train(
            bench.backend,
            data,
            [job],
            bench.initial_theta + 0.3,
            num_steps=1,
            learning_rate=1.0,
            training=bench.config.training,
            token_budget=64,
        )
    without, with_it = seen
    assert len(with_it) == len(without) + 1
    assert all(torch.equal(gradient, with_it[key]) for key, gradient in without.items())
