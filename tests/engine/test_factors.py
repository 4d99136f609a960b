"""Whichever factors a step trains: expanded leaves, Opacus' hooks and one-record autograd on merged weights agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.adapters.methods import Turn
from fedlora.adapters.methods import layout as layouts
from fedlora.data.encode import EncodedDataset
from fedlora.engine.batching import Shapes
from fedlora.engine.company import Company
from fedlora.engine.expanded import ExpandedBackend
from fedlora.engine.opacus import OpacusBackend
from fedlora.federation.workbench import Workbench
from fedlora.randomness import PublicSeed
from tests.engine.reference import assert_same, loop_over_records, random_theta, untouched_classifier

RAGGED = [5, 12, 3, 9, 12, 4]
OWNER = torch.tensor([0, 1, 2, 1, 0, 2])
FAMILIES = ["bert", "distilbert", "llama", "deberta-v2"]
TYPES = 'adapter.target_modules="query,value,up"'  # of deberta-v2's some also see positions that all records share
TURNS: dict[str, tuple[str, Turn | None]] = {
    "all": ("lora", None),
    "A and B": ("lora", Turn(("B", "A"))),
    "A alone": ("la_lora", Turn(("A",))),
    "B alone": ("la_lora", Turn(("B",))),
    "A, one B for all": ("rolora", Turn(("A",), ("B",))),
    "B, one A for all": ("rolora", Turn(("B",), ("A",))),
    "B of a remade A": ("ffa_svd", Turn(("B",), ("A",))),
    "R, random": ("fed_sb", Turn(("R",))),
    "R, from weights": ("fed_sb subspace=weights", Turn(("R",))),
    "R, B and A for all": ("fed_sb_svd", Turn(("R",), ("B", "A"))),
    "B of three factors": ("fed_sb_svd", Turn(("B",), ("R", "A"))),
    "A of three factors": ("fed_sb_svd", Turn(("A",), ("R", "B"))),
    "R, B and A": ("fed_sb_svd", None),
}


def bench_of(make_bench: Any, case: str, *overrides: str, **how: Any) -> tuple[Workbench, Turn | None]:
    name, turn = TURNS[case]
    method, *keys = name.split(" ")
    own = [f"adapter.method={method}", *(f"adapter.{key}" for key in keys), TYPES, "privacy.epsilon=inf", *overrides]
    bench = make_bench(*own, **how)
    if turn is not None and "model.head=trained" in overrides:
        turn = Turn((*turn.parts, "head"), turn.common)
    return bench, turn


def theta_of(bench: Workbench, clients: int, turn: Turn | None) -> Tensor:
    """Rows that agree in what is common to all clients and in nothing else."""
    theta = random_theta(bench.layout, clients)
    at = bench.layout.positions(turn.common if turn else ())
    theta[:, at] = theta[:1, at]
    return theta


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("case", TURNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_expanded_equals_a_loop_over_single_records(
    make_bench: Any, random_records: Any, family: str, case: str, clients: int, head: str
) -> None:
    bench, turn = bench_of(make_bench, case, f"model.head={head}", family=family)
    dataset, theta, owner = random_records(RAGGED), theta_of(bench, clients, turn), OWNER % clients
    batch, labels = dataset.batch(np.arange(len(dataset)))
    wanted = loop_over_records(bench.config, bench.layout, bench.places, theta, dataset, owner, turn)
    trained = [slot for slot in bench.layout.slots if turn is None or slot.part in turn.parts]
    for _ in range(2):  # nothing is left behind for the next batch
        got = bench.backend.gradients(theta, batch, labels, owner, turn)
        assert [part.shape[1] for part in got] == [slot.size for slot in trained]
        assert_same(got, wanted)


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("case", TURNS)
@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_opacus_equals_the_loop(make_bench: Any, random_records: Any, family: str, case: str, head: str) -> None:
    pytest.importorskip("opacus")
    bench, turn = bench_of(make_bench, case, "engine.backend=opacus", f"model.head={head}", family=family)
    assert isinstance(bench.backend, OpacusBackend)
    dataset, theta = random_records(RAGGED), theta_of(bench, 3, turn)
    for client in (2, 0):
        own = np.flatnonzero(OWNER.numpy() == client)
        part, owner = dataset.subset(own), OWNER[client == OWNER]
        batch, labels = part.batch(np.arange(len(own)))
        wanted = loop_over_records(bench.config, bench.layout, bench.places, theta, part, owner, turn)
        for _ in range(2):
            assert_same(bench.backend.gradients(theta, batch, labels, owner, turn), wanted)


@pytest.mark.parametrize("case", [case for case in TURNS if case != "R, from weights"])  # which wants float32
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_base_gives_finite_float32_gradients_near_the_exact_ones(
    make_bench: Any, random_records: Any, family: str, case: str
) -> None:
    batch, labels = random_records(RAGGED).batch(np.arange(len(RAGGED)))
    found = []
    for dtype in ("float32", "bfloat16"):
        bench, turn = bench_of(make_bench, case, f"model.dtype={dtype}", "model.head=trained", family=family)
        theta = 0.3 * theta_of(bench, 3, turn)
        found.append(torch.cat(bench.backend.gradients(theta, batch, labels, OWNER, turn), dim=1))
    exact, rough = found
    assert rough.dtype == torch.float32
    assert torch.isfinite(rough).all()
    assert torch.nn.functional.cosine_similarity(rough, exact, dim=1).min() > 0.95


@pytest.mark.parametrize("case", TURNS)
@pytest.mark.parametrize(("backend", "family"), [("expanded", name) for name in FAMILIES] + [("opacus", "bert")])
def test_no_record_shows_in_anothers_gradient(make_bench: Any, backend: str, family: str, case: str) -> None:
    bench, turn = bench_of(make_bench, case, f"engine.backend={backend}", "model.head=trained", family=family)
    vocabulary = len(bench.classifier.tokenizer)
    company = Company(
        backend=bench.backend, vocabulary=vocabulary, num_labels=2, device=torch.device("cpu"), turns=[turn]
    )
    Shapes(128, company.agreeing_rows).check(24)


@pytest.mark.parametrize("case", ["A and B", "A alone", "B alone", "R, random"])
def test_a_gradient_depends_on_its_own_record_and_client_only(make_bench: Any, random_records: Any, case: str) -> None:
    bench, turn = bench_of(make_bench, case, "model.head=trained")
    theta = theta_of(bench, 3, turn)
    batch, labels = random_records([8] * 6).batch(np.arange(6))
    before = torch.cat(bench.backend.gradients(theta, batch, labels, OWNER, turn), dim=1)
    batch["input_ids"][2] = 5
    changed = theta.clone()
    changed[1] *= 2.0
    after = torch.cat(bench.backend.gradients(changed, batch, labels, OWNER, turn), dim=1)
    assert (before == after).all(dim=1).tolist() == [True, False, False, False, True, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["A and B", "B alone", "R, B and A for all"])
def test_clients_without_a_record_in_a_micro_batch_change_no_bit(
    make_bench: Any, random_records: Any, case: str, dtype: str
) -> None:
    """Whether theta is rounded before its rows are copied or after: there are fewer clients than records, or more."""
    bench, turn = bench_of(make_bench, case, "model.head=trained", f"model.dtype={dtype}")
    batch, labels = random_records(RAGGED).batch(np.arange(len(RAGGED)))
    theta = theta_of(bench, 20, turn)
    few = bench.backend.gradients(theta[:3], batch, labels, OWNER, turn)
    many = bench.backend.gradients(theta, batch, labels, OWNER, turn)
    assert all(torch.equal(one, other) for one, other in zip(few, many, strict=True))


@pytest.mark.parametrize("name", ["expanded", "opacus"])
@pytest.mark.parametrize("turn", [None, Turn(("A",), ("B",)), Turn(("B",), ("A",))])
def test_modules_that_share_both_factors(tiny_config: Any, random_records: Any, name: str, turn: Turn | None) -> None:
    """A record has one gradient for what its modules share: the sum over them."""
    settings = tiny_config("adapter.method=lora")
    classifier = untouched_classifier(settings)
    modules = classifier.target_modules(["query", "value"])
    places = {"shared/16x16": tuple(modules)}
    layout = layouts.build_layout(modules, {}, places=places, rank=4, alpha=8.0, method="lora")
    frozen = layouts.frozen_parts("random", PublicSeed.from_int(0), modules, layout, places)
    assert frozen == ({}, {})
    backend = {"expanded": ExpandedBackend, "opacus": OpacusBackend}[name](classifier, layout, {}, places)
    dataset: EncodedDataset = random_records(RAGGED)
    theta, owner = random_theta(layout, 1), OWNER * 0
    batch, labels = dataset.batch(np.arange(len(dataset)))
    wanted = loop_over_records(settings, layout, places, theta, dataset, owner, turn)
    assert_same(backend.gradients(theta, batch, labels, owner, turn), wanted)


@pytest.mark.parametrize("case", TURNS)
def test_a_turn_is_a_part_of_the_whole_gradient(make_bench: Any, random_records: Any, case: str) -> None:
    """What a turn leaves out it only leaves out: nothing else is differentiated, or at another point."""
    bench, turn = bench_of(make_bench, case, "model.head=trained")
    theta = theta_of(bench, 3, turn)
    batch, labels = random_records(RAGGED).batch(np.arange(len(RAGGED)))
    whole = bench.backend.gradients(theta, batch, labels, OWNER)
    kept = [
        part for part, slot in zip(whole, bench.layout.slots, strict=True) if turn is None or slot.part in turn.parts
    ]
    assert_same(bench.backend.gradients(theta, batch, labels, OWNER, turn), kept)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@pytest.mark.parametrize("case", ["A and B", "A, one B for all", "R, random"])
def test_compiled_gradients_are_the_same(make_bench: Any, random_records: Any, case: str) -> None:
    plain, turn = bench_of(make_bench, case)
    compiled, _ = bench_of(make_bench, case, "engine.compile=on")
    batch, labels = random_records(RAGGED).batch(np.arange(len(RAGGED)))
    for clients in (1, 3):
        theta, owner = theta_of(plain, clients, turn), OWNER % clients
        wanted = plain.backend.gradients(theta, batch, labels, owner, turn)
        assert_same(compiled.backend.gradients(theta, batch, labels, owner, turn), wanted)
