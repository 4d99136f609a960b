"""Per-record gradients: the expanded leaf, Opacus' hooks and one-record autograd on merged weights agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlora.adapters.methods import layout as layouts
from fedlora.data.encode import EncodedDataset
from fedlora.errors import ModelError
from fedlora.federation.workbench import Workbench
from fedlora.randomness import PublicSeed
from tests.engine.reference import assert_same, loop_over_records, random_theta, untouched_classifier

RAGGED = [5, 12, 3, 9, 12, 4]
OWNER = torch.tensor([0, 1, 0, 1, 1, 0])
FAMILIES = ["bert", "roberta", "distilbert", "electra", "llama"]
VALUE = 'adapter.target_modules="value"'
ALL_TYPES = 'adapter.target_modules="query,value,up,down,attention_output"'
HEADS = {
    "native, frozen": ["model.head=frozen"],
    "native, trained": ["model.head=trained"],
    "mean, trained": ["model.head=trained", "model.pooling=mean"],
    "cls, frozen": ["model.head=frozen", "model.pooling=cls"],
    "last, trained": ["model.head=trained", "model.pooling=last"],
}


def check_against_loop(bench: Workbench, dataset: EncodedDataset) -> None:
    theta = random_theta(bench.layout, 2)
    owner = OWNER if bench.backend.fuses_clients else torch.ones_like(OWNER)
    batch, labels = dataset.batch(np.arange(len(dataset)))
    got = bench.backend.gradients(theta, batch, labels, owner)
    assert_same(got, loop_over_records(bench.config, bench.layout, bench.places, theta, dataset, owner))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_expanded_equals_a_loop_over_single_records(
    make_bench: Any, random_records: Any, family: str, attention: str
) -> None:
    check_against_loop(make_bench(f"model.attention={attention}", family=family), random_records(RAGGED))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_linear_can_be_adapted(make_bench: Any, random_records: Any, family: str) -> None:
    check_against_loop(make_bench(ALL_TYPES, "model.head=trained", family=family), random_records(RAGGED))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_heads_and_poolings(make_bench: Any, random_records: Any, family: str, head: str) -> None:
    check_against_loop(make_bench(*HEADS[head], family=family), random_records(RAGGED))


@pytest.mark.parametrize("family", ["distilbert", "electra"])
def test_native_trained_heads_of_the_other_families(make_bench: Any, random_records: Any, family: str) -> None:
    check_against_loop(make_bench("model.head=trained", family=family), random_records(RAGGED))


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_regression(make_bench: Any, random_records: Any, head: str) -> None:
    bench = make_bench("data.task=stsb", f"model.head={head}")
    check_against_loop(bench, random_records(RAGGED, classes=0))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [(family, [ALL_TYPES, "model.head=trained"]) for family in FAMILIES]
    + [("bert", settings) for settings in HEADS.values()]
    + [("deberta-v2", [VALUE])]
    + [
        ("bert", ["model.attention=sdpa"]),
        ("llama", ["model.attention=sdpa"]),
    ],
)
def test_opacus_equals_expanded(make_bench: Any, random_records: Any, family: str, overrides: list[str]) -> None:
    pytest.importorskip("opacus")
    dataset = random_records(RAGGED)
    fast, reference = (
        make_bench(*overrides, f"engine.backend={name}", family=family) for name in ("expanded", "opacus")
    )
    assert fast.layout.digest == reference.layout.digest
    theta = random_theta(fast.layout, 3)
    batch, labels = dataset.batch(np.arange(len(dataset)))
    owner = torch.full((len(dataset),), 2)
    for _ in range(2):  # hooks leave nothing behind for the next batch
        assert_same(
            fast.backend.gradients(theta, batch, labels, owner),
            reference.backend.gradients(theta, batch, labels, owner),
        )
    assert torch.allclose(fast.backend.logits(theta[2], batch), reference.backend.logits(theta[2], batch), atol=1e-5)


def test_opacus_equals_the_loop(make_bench: Any, random_records: Any) -> None:
    pytest.importorskip("opacus")
    check_against_loop(make_bench("engine.backend=opacus", ALL_TYPES, "model.head=trained"), random_records(RAGGED))


def test_minilm(make_bench: Any, minilm: str) -> None:
    bench = make_bench(f'model.name="{minilm}"', "model.head=trained", "model.pooling=mean", "adapter.rank=8")
    draw = np.random.default_rng(0)
    lengths = np.array([7, 20, 3, 11, 15, 4])
    dataset = EncodedDataset(
        ids=draw.integers(1000, 20000, lengths.sum()).astype(np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        labels=draw.integers(0, 2, len(lengths)),
        pad_token_id=0,
    )
    check_against_loop(bench, dataset)


@pytest.mark.parametrize(
    ("types", "shared"),
    [("query,value", True), ("key", True), ("query,key,value,up", True), ("query,key", False), ("pos_key_proj", False)],
)
def test_deberta_v2_whose_projections_also_see_the_shared_positions(
    make_bench: Any, random_records: Any, types: str, shared: bool
) -> None:
    bench = make_bench(
        f'adapter.target_modules="{types}"', "model.head=trained", family="deberta-v2", share_att_key=shared
    )
    dataset = random_records(RAGGED)
    for _ in range(2):  # leaves of one batch must not serve the next
        check_against_loop(bench, dataset)


def test_opacus_refuses_projections_that_see_shared_positions(make_bench: Any) -> None:
    """Its hooks would give gradients of the positions' batch of one; better none than wrong ones."""
    with pytest.raises(ModelError, match=r"query.*shared by all records"):
        make_bench("engine.backend=opacus", 'adapter.target_modules="query,value"', family="deberta-v2")


@pytest.mark.parametrize("backend", ["expanded", "opacus"])
def test_deberta_refuses_its_shared_position_projection(make_bench: Any, backend: str) -> None:
    with pytest.raises(ModelError, match="shared by all records"):
        make_bench('adapter.target_modules="pos_proj"', f"engine.backend={backend}", family="deberta")


def test_deberta_takes_its_fused_projection(make_bench: Any, random_records: Any) -> None:
    check_against_loop(make_bench('adapter.target_modules="in_proj"', family="deberta"), random_records(RAGGED))


def test_padding_width_changes_nothing(make_bench: Any, random_records: Any) -> None:
    dataset = random_records(RAGGED)
    for family in FAMILIES:
        bench = make_bench(family=family)
        theta = random_theta(bench.layout, 2)
        batch, labels = dataset.batch(np.arange(len(dataset)))
        wider = {name: torch.nn.functional.pad(tensor, (0, 11)) for name, tensor in batch.items()}
        assert_same(
            bench.backend.gradients(theta, wider, labels, OWNER), bench.backend.gradients(theta, batch, labels, OWNER)
        )


def test_a_gradient_depends_on_its_own_record_and_client_only(make_bench: Any, random_records: Any) -> None:
    bench = make_bench(ALL_TYPES, "model.head=trained")
    theta = random_theta(bench.layout, 2)
    batch, labels = random_records([8] * 6).batch(np.arange(6))
    before = torch.cat(bench.backend.gradients(theta, batch, labels, OWNER), dim=1)
    batch["input_ids"][2] = 5
    changed = theta.clone()
    changed[1] *= 2.0
    after = torch.cat(bench.backend.gradients(changed, batch, labels, OWNER), dim=1)
    same = (before == after).all(dim=1)
    assert same.tolist() == [True, False, False, False, False, True]


def test_logits_are_those_of_the_merged_weights(make_bench: Any, random_records: Any) -> None:
    bench = make_bench(ALL_TYPES)
    theta = random_theta(bench.layout, 1)[0]
    batch, _ = random_records(RAGGED).batch(np.arange(len(RAGGED)))
    classifier = untouched_classifier(bench.config)
    for slot in bench.layout.slots:
        path = slot.name.removesuffix("/B")
        linear = classifier.target_modules([path])[path]
        factor = layouts.frozen_factor(PublicSeed.from_int(0), path, 4, linear.in_features)
        linear.weight.data += bench.layout.scale * bench.layout.view(theta, slot) @ factor
    assert torch.allclose(bench.backend.logits(theta, batch), classifier(batch), atol=1e-5)


def test_at_the_start_the_adapted_model_is_the_base_model(make_bench: Any, random_records: Any) -> None:
    batch, _ = random_records(RAGGED).batch(np.arange(len(RAGGED)))
    for head in ("frozen", "trained"):
        bench = make_bench(f"model.head={head}")
        base = untouched_classifier(bench.config)(batch)
        assert torch.allclose(bench.backend.logits(bench.initial_theta, batch), base, atol=1e-6)


def test_bfloat16_base_gives_finite_float32_gradients_near_the_exact_ones(make_bench: Any, random_records: Any) -> None:
    batch, labels = random_records(RAGGED).batch(np.arange(len(RAGGED)))
    exact, rough = (make_bench(f"model.dtype={dtype}", "model.head=trained") for dtype in ("float32", "bfloat16"))
    theta = random_theta(exact.layout, 2)
    wanted = torch.cat(exact.backend.gradients(theta, batch, labels, OWNER), dim=1)
    got = torch.cat(rough.backend.gradients(theta, batch, labels, OWNER), dim=1)
    assert got.dtype == torch.float32
    assert torch.isfinite(got).all()
    assert torch.nn.functional.cosine_similarity(got, wanted, dim=1).min() > 0.95


def test_a_forward_that_fails_leaves_no_stale_leaf(make_bench: Any, random_records: Any) -> None:
    bench = make_bench()
    theta = random_theta(bench.layout, 2)
    batch, labels = random_records(RAGGED).batch(np.arange(len(RAGGED)))
    plain = bench.classifier(batch)
    with pytest.raises((IndexError, RuntimeError)):
        bench.backend.gradients(theta, {**batch, "input_ids": batch["input_ids"] + 10_000}, labels, OWNER)
    assert torch.equal(bench.classifier(batch), plain)
