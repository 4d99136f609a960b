"""Gates from gradients of weights: what autograd finds for an explicit gate, and scores that no record can move far."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from fedlora.adapters.methods import layout as layouts
from fedlora.adapters.slots import AdapterLayout
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import record_losses
from fedlora.engine.batching import Shapes
from fedlora.engine.gates import GatedSlots, alignment_sums
from fedlora.errors import AdapterError
from fedlora.federation.workbench import Workbench
from fedlora.privacy.clipping import AUTOMATIC_STABILITY
from fedlora.randomness import PublicSeed
from tests.engine.reference import assert_same, loop_over_records, random_theta, untouched_classifier

RAGGED = [5, 12, 3, 9, 12, 4]
OWNER = torch.tensor([0, 1, 0, 1, 1, 0])
SEARCH = ("adapter.select=alignment", "model.head=trained")  # all linears of a block, and a head without a gate
BACKENDS = ["expanded", "opacus"]
ROUNDING = 1e-9


@pytest.fixture(params=BACKENDS)
def bench(request: pytest.FixtureRequest, make_bench: Any) -> Workbench:
    if request.param == "opacus":
        pytest.importorskip("opacus")
    made: Workbench = make_bench(*SEARCH, f"engine.backend={request.param}")
    return made


def owners_of(bench: Workbench) -> Tensor:
    return OWNER if bench.backend.fuses_clients else torch.ones_like(OWNER)


def random_gates(clients: int, modules: int) -> Tensor:
    return 2 * torch.rand(clients, modules, generator=torch.Generator().manual_seed(3))


def loop_with_gates(
    bench: Workbench, modules: list[str], theta: Tensor, gates: Tensor, dataset: EncodedDataset, owner: Tensor
) -> tuple[list[Tensor], Tensor]:
    """dL/dB of every slot and dL/dγ [N, M] of h = W x + γ s B A x, one unpadded record at a time, by autograd."""
    classifier = untouched_classifier(bench.config)
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    linears = classifier.target_modules(bench.config.adapter.targets)
    factors = layouts.frozen_factors(
        PublicSeed.from_int(bench.config.run.seed), linears, bench.places, bench.config.adapter.rank
    )
    heads = {f"head:{path}": module for path, module in classifier.head_modules().items()}
    slots: list[list[Tensor]] = []
    of_gates: list[Tensor] = []
    for record in range(len(dataset)):
        client = owner[record]
        leaves = [bench.layout.view(theta[client], slot).clone().requires_grad_() for slot in bench.layout.slots]
        gate = gates[client].clone().requires_grad_()
        weights: dict[str, Tensor] = {}
        for slot, leaf in zip(bench.layout.slots, leaves, strict=True):
            base, _, suffix = slot.name.rpartition("/")
            if base in heads:
                weights[names[id(getattr(heads[base], suffix))]] = leaf
                continue
            strength = gate[modules.index(base)] if base in modules else 1.0
            weight = linears[base].weight
            weights[names[id(weight)]] = weight + bench.layout.scale * strength * leaf @ factors[base]
        batch, labels = dataset.batch(np.array([record]))
        loss = record_losses(functional_call(classifier, weights, (batch,)), labels).sum()
        *found, for_gates = torch.autograd.grad(loss, [*leaves, gate])
        slots.append([part.flatten() for part in found])
        of_gates.append(for_gates)
    return [torch.stack(parts) for parts in zip(*slots, strict=True)], torch.stack(of_gates)


# ------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("which", ["all", "some, in another order"])
def test_gradients_of_weights_and_gates_are_those_of_an_explicit_gate(
    bench: Workbench, random_records: Any, which: str
) -> None:
    everyone = [candidate.module for candidate in bench.candidates]
    modules = everyone if which == "all" else everyone[::-2]
    gated, dataset, owner = GatedSlots.of(bench.layout, modules), random_records(RAGGED), owners_of(bench)
    theta, gates = random_theta(bench.layout, 2), random_gates(2, len(modules))
    batch, labels = dataset.batch(np.arange(len(dataset)))
    gradients = bench.backend.gradients(gated.scaled(theta, gates), batch, labels, owner)
    of_slots, of_gates = loop_with_gates(bench, modules, theta, gates, dataset, owner)
    assert_same(gated.weighted(gradients, gates, owner), of_slots)
    assert_same([gated.products(gradients, theta, owner).float()], [of_gates])


def test_scaling_leaves_what_has_no_gate_and_what_it_was_given(bench: Workbench) -> None:
    theta = random_theta(bench.layout, 2)
    before = theta.clone()
    scaled = bench.gated.scaled(theta, torch.full((2, len(bench.candidates)), 3.0))
    assert torch.equal(theta, before)
    for slot in bench.layout.slots:
        factor = 1.0 if slot.name.startswith("head:") else 3.0
        assert torch.equal(bench.layout.view(scaled, slot), factor * bench.layout.view(theta, slot))


def test_at_b_zero_the_gradient_of_every_gate_is_exactly_zero(bench: Workbench, random_records: Any) -> None:
    """Not nearly: a search that starts there would follow nothing but its own noise."""
    dataset, owner, modules = random_records(RAGGED), owners_of(bench), len(bench.candidates)
    start = bench.initial_theta.repeat(2, 1)
    batch, labels = dataset.batch(np.arange(len(dataset)))
    gradients = bench.backend.gradients(bench.gated.scaled(start, random_gates(2, modules)), batch, labels, owner)
    assert all(part.abs().max() > 0 for part in gradients), "gradients of the weights are not zero"
    products = bench.gated.products(gradients, start, owner)
    assert products.shape == (len(dataset), modules)
    assert (products == 0).all()


def test_after_one_step_the_gates_gradient_is_the_alignment_of_two_gradients(
    make_bench: Any, random_records: Any
) -> None:
    """B = -η G_tr gives dL_val/dγ = -η <G_tr, G_val> to first order: the error is quadratic in η."""
    bench = make_bench(*SEARCH)
    dataset, gated, start = random_records([9, 7]), bench.gated, bench.initial_theta
    of_one = [
        bench.backend.gradients(start[None], *dataset.batch(np.array([record])), torch.zeros(1, dtype=torch.int64))
        for record in range(2)
    ]
    step = torch.zeros_like(start)  # a trained head stays where it is
    for place in gated.places:
        bench.layout.view(step, bench.layout.slots[place]).copy_(of_one[0][place].view(bench.layout.slots[place].shape))
    nobody = torch.zeros(1, dtype=torch.int64)
    aligned = gated.products(of_one[1], step[None], nobody)[0]
    assert aligned.abs().min() > 0
    errors = []
    for rate in (1e-2, 1e-3):
        moved = start - rate * step
        later = bench.backend.gradients(moved[None], *dataset.batch(np.array([1])), nobody)
        found = gated.products(later, (moved - start)[None], nobody)[0]
        errors.append(float((found + rate * aligned).norm() / (rate * aligned.norm())))
    assert errors[1] < 0.01
    assert errors[1] < 0.2 * errors[0]


def test_gates_want_slots_that_are_there(make_bench: Any) -> None:
    bench = make_bench(*SEARCH)
    with pytest.raises(AdapterError, match="2 gates without a slot, such as nowhere"):
        GatedSlots.of(bench.layout, ["nowhere", bench.candidates[0].module, "elsewhere"])


# ------------------------------------------------------------------------------------------------- alignment: value


def test_alignment_is_the_clipped_sum_of_a_loop_over_single_records(
    bench: Workbench, random_records: Any, make_phase: Any
) -> None:
    dataset, gated = random_records(RAGGED), bench.gated
    directions = gated.directions(random_theta(bench.layout, 1)[0])
    start, alone = bench.initial_theta, torch.zeros(len(RAGGED), dtype=torch.int64)
    wanted = loop_over_records(bench.config, bench.layout, bench.places, start[None], dataset, alone)
    rows = -gated.products(wanted, directions[None], alone)
    rows /= rows.norm(dim=1, keepdim=True) + AUTOMATIC_STABILITY
    records = [np.flatnonzero(client == OWNER) for client in range(2)]
    for budget in (1, 40, 10_000):
        found = alignment_sums(
            bench.backend,
            dataset,
            records,
            start=start,
            directions=directions,
            gated=gated,
            phase=make_phase(1.0, 0.0, 1.0, "automatic"),
            shapes=Shapes(budget),
        )
        for client in range(2):
            assert torch.allclose(found[client], rows[records[client]].sum(dim=0), atol=2e-5)


def test_directions_have_length_one_and_a_module_without_one_is_refused(make_bench: Any) -> None:
    bench = make_bench(*SEARCH)
    layout, theta = bench.layout, random_theta(bench.layout, 1, scale=3.0)[0]
    directions = bench.gated.directions(theta)
    for place in bench.gated.places:
        slot = layout.slots[place]
        norm = layout.view(theta, slot).norm()
        assert torch.allclose(norm * layout.view(directions, slot), layout.view(theta, slot), rtol=1e-5)
    layout.view(theta, layout.slots[bench.gated.places[3]]).zero_()
    with pytest.raises(AdapterError, match=r"1 of 12 modules have no direction.*adapter\.warmup_rounds"):
        bench.gated.directions(theta)


# ------------------------------------------------------------------------------------------- alignment: sensitivity

MODULES, WIDTH = 5, 6
TABLE_LAYOUT = AdapterLayout.build({f"m{m}/B": (3, 2) for m in range(MODULES)}, method="ffa", rank=2, alpha=1.0)
TABLE_GATES = GatedSlots.of(TABLE_LAYOUT, [f"m{m}" for m in range(MODULES)])


def hostile_gradients() -> dict[str, Tensor]:
    """What a record may do to move a sum: huge, tiny, not finite, all along the directions or against cancellation."""
    draw = torch.Generator().manual_seed(0)
    size = MODULES * WIDTH
    along, ordinary = torch.ones(size), torch.randn(size, generator=draw)
    cancelling = torch.where(torch.arange(size) % 2 == 0, 1e20, -1e20)
    return {
        "ordinary": ordinary,
        "huge": 1e20 * along,
        "overflowing": torch.full((size,), 3e38),
        "just clipped": along / math.sqrt(size),
        "tiny": 1e-30 * along,
        "cancelling": cancelling,
        "nan": torch.where(torch.arange(size) == 3, torch.nan, 1.0),
        "inf": torch.where(torch.arange(size) == 3, torch.inf, 1.0),
        "one module": torch.where(torch.arange(size) < WIDTH, 1e6, 0.0),
    }


HOSTILE_DIRECTIONS = {
    "ones": torch.ones(MODULES * WIDTH),
    "the largest": torch.full((MODULES * WIDTH,), 10.0),
    "barely there": torch.full((MODULES * WIDTH,), 1e-20),
    "one number": torch.zeros(MODULES * WIDTH).index_fill_(0, torch.arange(0, MODULES * WIDTH, WIDTH), 10.0),
}


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("towards", HOSTILE_DIRECTIONS)
@pytest.mark.parametrize("record", hostile_gradients())
def test_one_record_moves_the_scores_by_at_most_one(
    table_backend: Any, make_phase: Any, record: str, towards: str, clients: int
) -> None:
    """Whatever it is, however many sites are fused, in one micro-batch or many; and nobody else's scores at all."""
    others = torch.randn(9, MODULES * WIDTH, generator=torch.Generator().manual_seed(1))
    backend = table_backend(torch.cat([others, hostile_gradients()[record][None]]), (WIDTH,) * MODULES)
    directions = TABLE_GATES.directions(HOSTILE_DIRECTIONS[towards])
    without = [np.arange(9)[client::clients] for client in range(clients)]
    with_it = [*without[:-1], np.append(without[-1], 9)]

    def scores(records: list[np.ndarray], budget: int) -> Tensor:
        return alignment_sums(
            backend,
            backend.dataset,
            records,
            start=torch.zeros(TABLE_LAYOUT.size),
            directions=directions,
            gated=TABLE_GATES,
            phase=make_phase(1.0, 0.0, 1.0, "automatic"),
            shapes=Shapes(budget),
        )

    for budget in (1, 64, 10_000):
        moved = scores(with_it, budget) - scores(without, budget)
        assert moved[-1].isfinite().all()
        assert moved[-1].norm() <= 1
        assert moved[:-1].abs().sum() <= ROUNDING
        if record in ("nan", "inf", "overflowing"):
            assert moved[-1].abs().max() <= ROUNDING
        if record in ("ordinary", "huge", "one module"):
            assert moved[-1].norm() > 0.5, "the bound is reached, so the test is not blind"


def test_one_real_record_moves_the_scores_of_a_real_model_by_what_it_is_alone(
    make_bench: Any, random_records: Any, make_phase: Any
) -> None:
    """Along directions that are its own gradient, the worst a server could choose, beside any company."""
    bench = make_bench(*SEARCH)
    dataset, gated, start = random_records(RAGGED), bench.gated, bench.initial_theta
    own = bench.backend.gradients(start[None], *dataset.batch(np.array([5])), torch.zeros(1, dtype=torch.int64))
    directions = gated.directions(torch.cat([part[0] for part in own]))

    def scores(*records: list[int]) -> Tensor:
        return alignment_sums(
            bench.backend,
            dataset,
            [np.array(part, np.int64) for part in records],
            start=start,
            directions=directions,
            gated=gated,
            phase=make_phase(1.0, 0.0, 1.0, "automatic"),
            shapes=Shapes(40),
        )

    alone = scores([5])[0]
    assert 0.5 < alone.norm() <= 1
    assert torch.allclose(scores([0, 1, 2, 3, 4, 5])[0] - scores([0, 1, 2, 3, 4])[0], alone, atol=ROUNDING)
    assert torch.allclose(scores([0], [2, 5], [])[1] - scores([0], [2], [])[1], alone, atol=ROUNDING)
    assert (scores([0], [2, 5], [])[2] == 0).all(), "a site without records has scores of zero"
