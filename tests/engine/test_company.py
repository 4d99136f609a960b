"""No record can tell in another's gradient: bit for bit, through the shapes that `train` uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.adapters.methods import METHODS, Turn
from fedlora.engine import company
from fedlora.engine.batching import Quantity, Shapes, fixed_shapes
from fedlora.engine.company import Company
from fedlora.engine.expanded import ExpandedBackend
from fedlora.engine.sums import clipped_sums
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
        assert lengths[group.positions].min() > (group.columns - 8 if group.columns <= 32 else group.columns // 2)
    assert list(fixed_shapes(np.array([], dtype=np.int64), 512, 130)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_check_here(make_bench: Any, family: str, dtype: str) -> None:
    make_bench("model.head=trained", f"model.dtype={dtype}", "privacy.seeded_noise=false", family=family)


class Gossip:
    """A back end whose gradients carry a trace of the whole micro-batch."""

    fuses_clients = True
    slot_sizes = (3,)

    def gradients(self, theta: Tensor, batch: Any, labels: Tensor, owner: Tensor, turn: Any = None) -> list[Tensor]:
        ids = batch["input_ids"].float()
        return [ids[:, :3] + 1e-6 * ids.sum()]

    def logits(self, theta: Tensor, batch: Any) -> Tensor:
        raise NotImplementedError


def company_of(backend: Any) -> Company:
    return Company(backend=backend, vocabulary=50, num_labels=2, device=CPU)


def test_a_trace_of_the_others_is_found_and_one_by_one_is_the_way_out() -> None:
    company = company_of(Gossip())
    with pytest.raises(PrivacyError, match=r"engine\.token_budget=1"):
        Shapes(512, company.agreeing_rows).check(512)
    Shapes(1, company.agreeing_rows).check(512)
    assert company.agreeing_rows(16, (2, 8), clients=1) == ()
    cut = list(Shapes(512, company.agreeing_rows).cut(np.array([9, 10, 11]), 512))
    assert [len(group.positions) for group in cut] == [1, 1, 1]


class Shaped(Gossip):
    """As kernels are: the number of rows decides the order of summation, here from 8 rows on in another way."""

    def gradients(self, theta: Tensor, batch: Any, labels: Tensor, owner: Tensor, turn: Any = None) -> list[Tensor]:
        ids = batch["input_ids"].float()
        return [ids[:, :3] * (1 + 2**-20 * (len(ids) >= 8))]


class Placed(Gossip):
    """The row of a record decides, as where vectors of a loop end in a rest."""

    def gradients(self, theta: Tensor, batch: Any, labels: Tensor, owner: Tensor, turn: Any = None) -> list[Tensor]:
        ids = batch["input_ids"].float()
        return [ids[:, :3] * (1 + 2**-20 * (torch.arange(len(ids)) == len(ids) - 2)[:, None])]


def test_only_numbers_of_rows_that_give_the_same_bits_are_used() -> None:
    company = company_of(Shaped())
    assert company.agreeing_rows(8, (2, 4, 8, 16, 33), clients=2) == (8, 16, 33)
    assert company.agreeing_rows(8, (2, 4, 6), clients=2) == (2, 4, 6), "among themselves small ones agree"
    shapes = Shapes(8 * 33, company.agreeing_rows, patience=0)
    for count, rows in ((1, [8]), (7, [8]), (8, [16]), (15, [16]), (16, [33]), (32, [33]), (40, [33, 16])):
        assert [group.rows for group in shapes.cut(np.full(count, 5), 512)] == rows
    assert [group.rows for group in shapes.cut(np.full(4, 5), 512, expected=5)] == [6]


class Rare(Gossip):
    """Another kernel whose doing rounding hides in nine of ten records, as bfloat16 does."""

    def gradients(self, theta: Tensor, batch: Any, labels: Tensor, owner: Tensor, turn: Any = None) -> list[Tensor]:
        ids = batch["input_ids"].float()
        return [ids[:, :3] * (1 + 2**-20 * (len(ids) < 16) * (ids[:, :1] % 10 == 3))]


@pytest.mark.parametrize("columns", [8, 16, 32])
def test_what_rounding_hides_in_most_records_is_found_all_the_same(columns: int) -> None:
    assert company_of(Rare()).agreeing_rows(columns, (8, 16, 32), clients=1) == (16, 32)


def test_an_inner_product_that_is_cut_otherwise_for_fewer_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search clips products, of which cancellation may leave nothing but rounding."""

    class Alike(Gossip):
        def gradients(self, theta: Tensor, batch: Any, labels: Tensor, owner: Tensor, turn: Any = None) -> list[Tensor]:
            return [batch["input_ids"].float()[:, :3]]

    genuine = torch.linalg.vecdot

    def cut(one: Tensor, other: Tensor) -> Tensor:
        product: Tensor = genuine(one, other)
        return product * (1 + 2**-50 * (len(one) < 16))

    company = company_of(Alike())
    assert company.agreeing_rows(8, (8, 16, 32), clients=1) == (8, 16, 32)
    monkeypatch.setattr(torch.linalg, "vecdot", cut)
    assert company.agreeing_rows(8, (8, 16, 32), clients=1) == (16, 32)


def test_a_row_that_is_treated_otherwise_is_found() -> None:
    assert company_of(Placed()).agreeing_rows(8, (2, 4, 8), clients=1) == ()


def test_what_is_expected_bounds_the_rows_and_what_came_does_not() -> None:
    shapes = Shapes(1024)
    for count in (1, 5, 40):
        assert {group.rows for group in shapes.cut(np.full(count, 5), 512, expected=8.2)} == {10}
    assert {group.rows for group in shapes.cut(np.full(5, 5), 512, expected=0.3)} == {2}


class LoneLeak(Gossip):
    """Kernels that mix records where a lone client's adapters are not copied."""

    def gradients(self, theta: Tensor, batch: Any, labels: Tensor, owner: Tensor, turn: Any = None) -> list[Tensor]:
        ids = batch["input_ids"].float()
        return [ids[:, :3] + 1e-3 * ids.sum() * (len(theta) == 1)]


@pytest.mark.parametrize("steps", [1, 99, 1000])
def test_every_width_is_looked_at_in_the_shape_and_on_the_path_of_training(make_bench: Any, steps: int) -> None:
    """From the first step on, in short runs too: who cannot be seen to be alike is alone."""
    bench = make_bench("privacy.seeded_noise=false", f"federation.rounds={steps}", "federation.local_steps=1")
    asked: list[tuple[int, tuple[int, ...], int]] = []
    genuine = bench.shapes.agreeing

    def agreeing(columns: int, counts: Sequence[int], clients: int, quantity: Quantity) -> Sequence[int]:
        asked.append((columns, tuple(counts), clients))
        found: Sequence[int] = genuine(columns, counts, clients, quantity)
        return found

    shapes = replace(bench.shapes, agreeing=agreeing)
    for clients in (1, 3):
        for group in shapes.cut(np.array([5, 12, 16, 20]), 512, clients=clients, expected=8):
            assert (group.columns, (group.rows,), clients) in asked
    mixed = replace(bench.shapes, agreeing=company_of(LoneLeak()).agreeing_rows)
    assert [group.rows for group in mixed.cut(np.full(3, 12), 512, clients=1, expected=8)] == [2, 2, 2]
    assert [group.rows for group in mixed.cut(np.full(3, 12), 512, clients=3, expected=8)] == [9]


def test_smaller_micro_batches_wait_until_a_run_runs() -> None:
    shapes = Shapes(512, lambda columns, counts, *_: counts, patience=2)
    assert [[group.rows for group in shapes.cut(np.full(3, 8), 512)] for _ in range(4)] == [[64], [64], [16], [16]]


def test_what_was_found_out_is_not_asked_again() -> None:
    asked: list[tuple[int, int, str]] = []

    def agreeing(columns: int, counts: Sequence[int], clients: int, quantity: Quantity) -> Sequence[int]:
        asked.append((columns, clients, quantity))
        return counts

    shapes = Shapes(256, agreeing)
    for clients in (1, 2, 5, 1, 2):
        list(shapes.cut(np.array([3, 3, 12]), 512, clients=clients))
    expected = [(16, 1), (8, 1), (16, 2), (8, 2)]
    assert asked == [(*one, "gradients") for one in expected], "once for many clients and once for a lone one"
    asked.clear()
    shapes.check(512)
    list(shapes.cut(np.array([20]), 512, clients=2))
    assert asked == [(24, 2, "gradients")], "what was looked at before the run serves its first step"
    asked.clear()
    for _ in range(2):
        list(shapes.cut_full(np.array([3, 3]), 512, "logits"))
        list(shapes.cut_full(np.array([3, 3]), 512, "embeddings"))
    assert asked == [(8, 1, "logits"), (8, 1, "embeddings")], "other kernels, another question"


class LeakyForward(Gossip):
    """Gradients are each record's own; logits are not."""

    def gradients(self, theta: Tensor, batch: Any, labels: Tensor, owner: Tensor, turn: Any = None) -> list[Tensor]:
        return [batch["input_ids"].float()[:, :3]]

    def logits(self, theta: Tensor, batch: Any) -> Tensor:
        assert theta.shape == (3,), "one flat vector, as an evaluation has it"
        ids = batch["input_ids"].float()
        return ids[:, :2] + 1e-6 * ids.sum()

    def embed(self, batch: Any) -> Tensor:
        assert not torch.is_grad_enabled(), "as in a release: torch may take other kernels for what has no gradient"
        return torch.nn.functional.normalize(self.logits(torch.zeros(3), batch))


def test_logits_and_embeddings_are_looked_at_for_themselves() -> None:
    backend: Any = LeakyForward()
    company = replace(company_of(backend), classifier=backend)
    shapes = Shapes(512, company.agreeing_rows)
    lengths = np.array([9, 10, 11])
    assert [group.rows for group in shapes.cut(lengths, 512)] == [32]
    assert [group.rows for group in shapes.cut_full(lengths, 512, "logits")] == [2, 2, 2]
    assert [group.rows for group in shapes.cut_full(lengths, 512, "embeddings")] == [2, 2, 2]
    assert company_of(backend).agreeing_rows(16, (8,), 1, "embeddings") == (), "whose nobody says"


def test_what_is_passed_over_once_is_no_step_that_a_run_waits_for() -> None:
    shapes = Shapes(512, lambda columns, counts, *_: counts, patience=1)
    for _ in range(3):
        assert [group.rows for group in shapes.cut_full(np.full(3, 8), 512, "embeddings")] == [64]
    assert [[group.rows for group in shapes.cut(np.full(3, 8), 512)] for _ in range(2)] == [[64], [16]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smaller_micro_batches_give_the_same_sums(
    make_bench: Any, random_records: Any, make_phase: Any, dtype: str
) -> None:
    """To the last bit of every record, and so up to the order of float64 additions."""
    options = f"model.dtype={dtype}", "engine.token_budget=512", "privacy.seeded_noise=false", "federation.rounds=200"
    bench = make_bench("model.head=trained", *options)
    data = random_records([5, 6, 7, 9, 12, 12, 14, 3, 16, 30])
    rows, phase = (bench.initial_theta + 0.3).repeat(2, 1), make_phase(1.0, 0.0, 0.01)
    drawn = [np.arange(4), np.arange(4, 10)]
    full, fewer = (
        clipped_sums(bench.backend, data, drawn, rows, phase, shapes=shapes)
        for shapes in (Shapes(512), replace(bench.shapes, patience=0))
    )
    assert bench.shapes.row_counts(8, 2, np.inf, fewer=True) != (64,)
    assert (full - fewer).abs().max() <= 1e-15 * full.abs().max()


def test_a_head_that_silences_gradients_does_not_blind_the_check(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may send a head of zeros first and another one later; what was found out under the first must hold."""
    bench = make_bench("model.head=prototype", "privacy.seeded_noise=false", "federation.local_steps=100")
    seen = []
    genuine = company._fingerprints

    def spy(gradients: Sequence[Tensor]) -> Tensor:
        seen.append(max(part.abs().max().item() for part in gradients))
        return genuine(gradients)

    monkeypatch.setattr(company, "_fingerprints", spy)
    bench.shapes.row_counts(16, 1, 30, fewer=True)
    assert min(seen) > 0
    assert bench.classifier.head.linear.weight.abs().max() == 0, "and the head is what it was"


def test_a_workbench_is_not_built_where_records_influence_one_another(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(company, "_fingerprints", lambda gradients: torch.randint(2**40, (len(gradients[0]),)))
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

    def spy(backend: Any, theta: Tensor, batch: Any, labels: Tensor, owner: Tensor, turn: Any = None) -> list[Tensor]:
        parts: list[Tensor] = genuine(backend, theta, batch, labels, owner, turn)
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
            shapes=Shapes(64),
        )
    without, with_it = seen
    assert len(with_it) == len(without) + 1
    assert all(torch.equal(gradient, with_it[key]) for key, gradient in without.items())


class LeakyInOneTurn(Gossip):
    """Sound where everything is trained, and where B is: only the kernels of A's gradient mix records."""

    def gradients(self, theta: Tensor, batch: Any, labels: Tensor, owner: Tensor, turn: Any = None) -> list[Tensor]:
        ids = batch["input_ids"].float()
        return [ids[:, :3] + 1e-6 * ids.sum() * (turn is not None and turn.parts == ("A",))]


def test_every_turn_of_a_run_is_looked_at() -> None:
    backend = LeakyInOneTurn()
    b, a = Turn(("B",), common=("A",)), Turn(("A",), common=("B",))
    for turns, agree in (((None,), True), ((b,), True), ((b, a), False)):
        found = replace(company_of(backend), turns=turns).agreeing_rows(16, (8,), 2)
        assert bool(found) == agree


IN_TURN = {"rolora": ("B", "A"), "la_lora": ("B", "A"), "ffa_svd": ("B",), "fed_sb_svd": ("B", "A", "R")}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_looks_at_all_that_its_steps_train(make_bench: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[Any] = set()
    genuine = ExpandedBackend.gradients

    def spy(self: Any, theta: Tensor, batch: Any, labels: Tensor, owner: Tensor, turn: Any = None) -> Any:
        seen.add(None if turn is None else turn.parts)
        return genuine(self, theta, batch, labels, owner, turn)

    monkeypatch.setattr(ExpandedBackend, "gradients", spy)
    make_bench(f"adapter.method={method}")
    assert seen == ({(part,) for part in IN_TURN[method]} if method in IN_TURN else {None})
