"""Weights and gates in turn: each half of the records in its own sums only, every sum noised by its own plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from fedlora.adapters.slots import AdapterLayout
from fedlora.config import TrainingConfig
from fedlora.engine.batching import Shapes
from fedlora.engine.gates import GatedSlots, SearchJob, search
from fedlora.errors import PrivacyError
from fedlora.federation.workbench import Workbench
from fedlora.privacy.clipping import AUTOMATIC_STABILITY, Clipping
from fedlora.privacy.noise import HostNoise, NoiseSource
from fedlora.privacy.phases import BILEVEL
from fedlora.privacy.plan import PhasePlan
from fedlora.randomness import SecretRoot
from tests.engine.reference import random_theta
from tests.engine.test_gates import loop_with_gates
from tests.engine.test_noise import Sabotaged, are_uncorrelated, has_std, is_normal

MODULES, WIDTH = 40, 6
LAYOUT = AdapterLayout.build(
    {f"m{m}/B": (3, 2) for m in range(MODULES)} | {"head:dense/bias": (WIDTH,)}, method="ffa", rank=2, alpha=1.0
)
GATED = GatedSlots.of(LAYOUT, [f"m{m}" for m in range(MODULES)])
SIZE, WIDTHS = LAYOUT.size, (WIDTH,) * (MODULES + 1)
CLIP, BATCH = 0.4, 4
TRAINING = TrainingConfig(optimizer="sgd", expected_batch_size=BATCH)
REAL_SEARCH = ("adapter.select=bilevel", "federation.rounds=5", "model.head=trained")
MakePhase = Any


def search_phase(make_phase: MakePhase, probability: float, noise_multiplier: float, num_steps: int = 99) -> PhasePlan:
    gates = make_phase(probability, noise_multiplier, 1.0, "automatic", num_steps)
    weights = make_phase(probability, noise_multiplier, CLIP, "flat", num_steps)
    return dataclasses.replace(weights, name=BILEVEL, beside=dataclasses.replace(gates, name="gates"))


def job_of(
    weights: Sequence[int], gates: Sequence[int], phase: PhasePlan, client: int = 0, round_index: int = 0
) -> SearchJob:
    return SearchJob(
        weight_records=np.array(weights, np.int64),
        gate_records=np.array(gates, np.int64),
        phase=phase,
        sampling=SecretRoot.seeded(5).numpy("sampling", client, round_index),
        noise=HostNoise(SecretRoot.seeded(5).numpy("noise", client, round_index)),
    )


def searched(
    backend: Any, jobs: list[SearchJob], theta: Tensor | None = None, logits: Tensor | None = None, **changes: Any
) -> Tensor:
    """[K, P + M], by default from gates of 1; rates of 0 by default, so that every step is taken at the same point."""
    settings = {"num_steps": 1, "learning_rate": 0.0, "gate_learning_rate": 0.0, "shapes": Shapes(64), **changes}
    start = torch.ones(SIZE) if theta is None else theta
    gates = torch.zeros(MODULES) if logits is None else logits
    return torch.stack(search(backend, backend.dataset, jobs, start, gates, GATED, training=TRAINING, **settings))


@dataclass(frozen=True)
class Added:
    """One micro-batch that went into a sum."""

    phase: str
    records: list[int]
    owners: list[int]


@dataclass(frozen=True)
class Sums:
    """What a run added up, and every sum just before its noise, in order."""

    added: list[Added] = field(default_factory=list)
    totals: list[tuple[str, Tensor]] = field(default_factory=list)
    backends: list[Any] = field(default_factory=list)

    def watch(self, backend: Any) -> Any:
        """`backend`, which from now on says which records are added."""
        self.backends.append(backend)
        return backend

    def of(self, phase: str) -> list[Tensor]:
        return [total for name, total in self.totals if name == phase]


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Sums:
    """Looks over the shoulder of `PhasePlan`, the only way into a sum and the only way out."""
    seen = Sums()
    add, privatize = PhasePlan.add_clipped, PhasePlan.privatize

    def added(self: PhasePlan, total: Tensor, vectors: Sequence[Tensor], owner: Tensor) -> None:
        records, owners = seen.backends[-1].asked[-1]
        assert owners == owner.tolist()
        seen.added.append(Added(self.name, records, owners))
        add(self, total, vectors, owner)

    def privatized(self: PhasePlan, total: Tensor, *, noise: NoiseSource, slot_sizes: Sequence[int]) -> Tensor:
        seen.totals.append((self.name, total.clone()))
        return privatize(self, total, noise=noise, slot_sizes=slot_sizes)

    monkeypatch.setattr(PhasePlan, "add_clipped", added)
    monkeypatch.setattr(PhasePlan, "privatize", privatized)
    return seen


def random_table(records: int, seed: int = 0) -> Tensor:
    return torch.randn(records, SIZE, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- exactness

LENGTHS = [5, 12, 3, 9, 12, 4, 7, 8]


def searched_on(bench: Workbench, dataset: Any, jobs: list[SearchJob], logits: Tensor, **changes: Any) -> Tensor:
    """[K, P + M] after search on a real model from a common random theta."""
    settings = {"num_steps": 1, "learning_rate": 0.0, "gate_learning_rate": 0.0, "shapes": Shapes(40), **changes}
    theta = random_theta(bench.layout, 1)[0]
    found = search(bench.backend, dataset, jobs, theta, logits, bench.gated, training=TRAINING, **settings)
    return torch.stack(found)


def random_logits(bench: Workbench) -> Tensor:
    return torch.randn(len(bench.candidates), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("backend", ["expanded", "opacus"])
def test_a_step_is_that_of_clipped_gradients_over_weights_and_over_logits(
    make_bench: Any, random_records: Any, make_phase: MakePhase, backend: str
) -> None:
    """Both by autograd, one unpadded record at a time, with γ = 2 sigmoid(logit) as an explicit gate."""
    if backend == "opacus":
        pytest.importorskip("opacus")
    bench = make_bench(*REAL_SEARCH, f"engine.backend={backend}")
    dataset, phase = random_records(LENGTHS), search_phase(make_phase, 1.0, 0.0)
    halves = [([0, 3, 5], [1]), ([2, 7], [4, 6])]
    theta, logits = random_theta(bench.layout, 1)[0], random_logits(bench)
    leaf = logits.clone().requires_grad_()
    gates = 2 * leaf.sigmoid()
    (slopes,) = torch.autograd.grad(gates.sum(), leaf)
    modules, alone = [candidate.module for candidate in bench.candidates], torch.zeros(len(LENGTHS), dtype=torch.int64)
    of_slots, of_gates = loop_with_gates(bench, modules, theta[None], gates.detach()[None], dataset, alone)
    weights = torch.cat(of_slots, dim=1)
    weights *= (CLIP / weights.norm(dim=1, keepdim=True)).clamp(max=1)
    scores = of_gates * slopes
    scores /= scores.norm(dim=1, keepdim=True) + AUTOMATIC_STABILITY

    def jobs() -> list[SearchJob]:
        return [job_of(*half, phase, client) for client, half in enumerate(halves)]

    size = bench.layout.size
    moved_weights = searched_on(bench, dataset, jobs(), logits, learning_rate=0.5)[:, :size] - theta
    moved_gates = searched_on(bench, dataset, jobs(), logits, gate_learning_rate=3.0)[:, size:] - logits
    for client, (for_weights, for_gates) in enumerate(halves):
        assert torch.allclose(moved_weights[client], -0.5 / BATCH * weights[for_weights].sum(dim=0), atol=2e-6)
        assert torch.allclose(moved_gates[client], -3.0 / BATCH * scores[for_gates].sum(dim=0), atol=2e-5)


def test_sites_that_share_a_call_find_what_each_finds_alone(
    make_bench: Any, random_records: Any, make_phase: MakePhase
) -> None:
    bench = make_bench(*REAL_SEARCH)
    dataset, phase, logits = random_records(LENGTHS), search_phase(make_phase, 0.8, 0.5), random_logits(bench)
    halves = [([0, 3], [1, 2]), ([4, 7], [5, 6])]
    rates = {"num_steps": 4, "learning_rate": 0.5, "gate_learning_rate": 1.0}

    def jobs() -> list[SearchJob]:
        return [job_of(*half, phase, client) for client, half in enumerate(halves)]

    together = searched_on(bench, dataset, jobs(), logits, **rates)
    for client, job in enumerate(jobs()):
        assert torch.allclose(searched_on(bench, dataset, [job], logits, **rates)[0], together[client], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=0.01)


# --------------------------------------------------------------------------------------- which record goes where


@pytest.mark.parametrize("token_budget", [1, 64, 10_000])
def test_a_record_of_one_half_never_enters_the_others_sum(
    table_backend: Any, make_phase: MakePhase, sums: Sums, token_budget: int
) -> None:
    backend = sums.watch(table_backend(random_table(60), WIDTHS))
    halves = [(range(20 * c, 20 * c + 12), range(20 * c + 12, 20 * c + 20)) for c in range(3)]
    phase = search_phase(make_phase, 0.5, 0.0)
    jobs = [job_of(weights, gates, phase, client) for client, (weights, gates) in enumerate(halves)]
    searched(backend, jobs, num_steps=9, learning_rate=0.3, gate_learning_rate=0.5, shapes=Shapes(token_budget))
    assert [name for name, _ in sums.totals] == 9 * [*3 * [BILEVEL], *3 * ["gates"]], "in turn, once for each client"
    met: dict[str, set[int]] = {BILEVEL: set(), "gates": set()}
    for entry in sums.added:
        for record, owner in zip(entry.records, entry.owners, strict=True):
            assert record in halves[owner][entry.phase == "gates"]
        met[entry.phase] |= set(entry.records)
    assert met[BILEVEL] == {record for weights, _ in halves for record in weights}
    assert met["gates"] == {record for _, gates in halves for record in gates}


def test_every_client_samples_both_halves_at_its_own_rate(
    table_backend: Any, make_phase: MakePhase, sums: Sums
) -> None:
    """Sites of different size share a call. Exact two-sided binomial bounds, false alarms 1e-6 for each count."""
    backend, steps, rates = sums.watch(table_backend(torch.zeros(120, SIZE), WIDTHS)), 60, (0.7, 0.2, 0.05)
    jobs = [
        job_of(range(40 * c, 40 * c + 20), range(40 * c + 20, 40 * c + 40), search_phase(make_phase, rate, 1.0), c)
        for c, rate in enumerate(rates)
    ]
    searched(backend, jobs, num_steps=steps, shapes=Shapes(10_000))
    trials = 20 * steps
    for phase in (BILEVEL, "gates"):
        for client, rate in enumerate(rates):
            drawn = sum(entry.owners.count(client) for entry in sums.added if entry.phase == phase)
            assert binom.ppf(5e-7, trials, rate) <= drawn <= binom.isf(5e-7, trials, rate), (phase, client)


@pytest.mark.parametrize("missing", ["gates", "weights"])
def test_a_half_without_records_is_noised_like_any_other(
    table_backend: Any, make_phase: MakePhase, sums: Sums, missing: str
) -> None:
    backend = sums.watch(table_backend(random_table(6), WIDTHS))
    halves: tuple[Any, Any] = ([], range(6)) if missing == "weights" else (range(6), [])
    job = job_of(*halves, search_phase(make_phase, 1.0, 1.0))
    found = searched(backend, [job], learning_rate=1.0, gate_learning_rate=1.0)[0]
    assert (sums.of(BILEVEL if missing == "weights" else "gates")[0] == 0).all()
    assert (found[:SIZE] != 1).all()
    assert (found[SIZE:] != 0).any()


def test_jobs_that_clip_differently_or_plan_no_gates_are_refused(table_backend: Any, make_phase: MakePhase) -> None:
    backend, sound = table_backend(random_table(6), WIDTHS), search_phase(make_phase, 0.5, 1.0)
    assert sound.beside is not None
    looser = dataclasses.replace(sound.beside, clipping=Clipping("automatic", 2.0))
    for other in (
        dataclasses.replace(sound, clipping=Clipping("flat", 2 * CLIP)),
        dataclasses.replace(sound, beside=None),
        dataclasses.replace(sound, beside=looser),
    ):
        for phases in ((sound, other), (other, sound)):
            jobs = [job_of([0, 1], [2], phase, client) for client, phase in enumerate(phases)]
            with pytest.raises(PrivacyError, match=r"search in separate calls|plans no steps of gates"):
                searched(backend, jobs)


# ---------------------------------------------------------------------------------------------------- sensitivity


def hostile_rows() -> dict[str, Tensor]:
    draw = torch.randn(SIZE, generator=torch.Generator().manual_seed(9))
    return {
        "ordinary": draw,
        "huge": 1e20 * draw.sign(),
        "overflowing": torch.full((SIZE,), 3e38),
        "one module": torch.where(torch.arange(SIZE) < WIDTH, 1e8, 0.0),
        "not finite": torch.where(torch.arange(SIZE) == 7, torch.nan, 1e5),
    }


@pytest.mark.parametrize("half", ["weights", "gates"])
@pytest.mark.parametrize("row", hostile_rows())
def test_one_record_moves_its_own_halfs_sums_by_at_most_c_and_the_others_not_at_all(
    table_backend: Any, make_phase: MakePhase, sums: Sums, row: str, half: str
) -> None:
    """Neighbours in every step at the same point, gates open and shut, all records drawn, beside another site."""
    backend = sums.watch(table_backend(torch.cat([random_table(20), hostile_rows()[row][None]]), WIDTHS))
    theta = torch.randn(SIZE, generator=torch.Generator().manual_seed(2))
    phase, steps, moved = search_phase(make_phase, 1.0, 0.0), 3, {}
    runs = []
    for extra in ([], [20]):
        weights, gates = [*range(6), *(extra if half == "weights" else [])], [*range(6, 10)]
        gates += extra if half == "gates" else []
        sums.totals.clear()
        jobs = [job_of(weights, gates, phase, 0), job_of(range(10, 15), range(15, 20), phase, 1)]
        searched(backend, jobs, theta, torch.linspace(-3, 3, MODULES), num_steps=steps)
        runs.append({name: torch.stack(sums.of(name)).unflatten(0, (steps, 2)) for name in (BILEVEL, "gates")})
    for name, bound in ((BILEVEL, CLIP), ("gates", 1.0)):
        moved = runs[1][name] - runs[0][name]
        own, other_site = moved[:, 0].norm(dim=1), moved[:, 1].norm(dim=1)
        assert (other_site <= 1e-12).all()
        if (name == "gates") == (half == "gates"):
            assert (own <= bound).all()
            if row in ("ordinary", "huge", "one module"):
                assert (own > 0.9 * bound).all(), "the bound is reached, so the test is not blind"
        else:
            assert (own == 0).all()


def test_without_a_rate_and_without_noise_nothing_moves(table_backend: Any, make_phase: MakePhase) -> None:
    backend = table_backend(random_table(20), WIDTHS)
    found = searched(backend, [job_of(range(10), range(10, 20), search_phase(make_phase, 1.0, 0.0))], num_steps=2)
    assert torch.equal(found[0], torch.cat([torch.ones(SIZE), torch.zeros(MODULES)]))


def test_at_b_zero_gates_stay_exactly_where_they_are(table_backend: Any, make_phase: MakePhase) -> None:
    """As long as weights do not move; one step of theirs is enough to move gates."""
    backend, theta = table_backend(random_table(20), WIDTHS), torch.zeros(SIZE)
    for rate, still in ((0.0, True), (0.1, False)):
        job = job_of(range(10), range(10, 20), search_phase(make_phase, 1.0, 0.0))
        found = searched(backend, [job], theta, num_steps=3, learning_rate=rate, gate_learning_rate=1.0)[0]
        assert bool((found[SIZE:] == 0).all()) == still


# ---------------------------------------------------------------------------------------------------------- noise

SIGMA, CLIENTS, STEPS = 1.7, 4, 24


def released(backend: Any, phase: PhasePlan, round_index: int = 0) -> Tensor:
    """[STEPS, CLIENTS, P + M]: how far each step moved weights and gates at rates of 1, streams going on."""
    jobs = [job_of([0, 1], [2, 3], phase, client, round_index) for client in range(CLIENTS)]
    start = torch.cat([torch.zeros(SIZE), torch.zeros(MODULES)])
    rates = {"learning_rate": 1.0, "gate_learning_rate": 1.0}
    return torch.stack([searched(backend, jobs, start[:SIZE], **rates) - start for _ in range(STEPS)])


@pytest.fixture
def silent_backend(table_backend: Any) -> Any:
    return table_backend(torch.zeros(4, SIZE), WIDTHS)


def test_weights_and_gates_carry_the_noise_of_their_plan_in_every_step(
    silent_backend: Any, make_phase: MakePhase
) -> None:
    moves = released(silent_backend, search_phase(make_phase, 0.8, SIGMA))
    for part, wanted in ((moves[..., :SIZE], SIGMA * CLIP / BATCH), (moves[..., SIZE:], SIGMA / BATCH)):
        assert has_std(part, wanted)
        assert is_normal(part, wanted)
        assert not has_std(part, 0.9 * wanted)
        assert not has_std(part, 1.1 * wanted)
        for step in part:
            assert (step != 0).all(), "no step of no client goes without"


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_gates_with_less_or_more_noise_are_caught(silent_backend: Any, make_phase: MakePhase, factor: float) -> None:
    sound = search_phase(make_phase, 0.8, SIGMA)
    assert sound.beside is not None
    beside = dataclasses.replace(sound.beside, mechanism=Sabotaged(SIGMA, factor))
    moves = released(silent_backend, dataclasses.replace(sound, beside=beside))
    assert not has_std(moves[..., SIZE:], SIGMA / BATCH)
    assert has_std(moves[..., SIZE:], factor * SIGMA / BATCH)


def test_noise_adds_up_over_the_steps_of_a_call(silent_backend: Any, make_phase: MakePhase) -> None:
    phase = search_phase(make_phase, 0.8, SIGMA)
    jobs = [job_of([0, 1], [2, 3], phase, client) for client in range(100)]
    moved = searched(silent_backend, jobs, torch.zeros(SIZE), num_steps=9, learning_rate=0.3, gate_learning_rate=0.5)
    assert has_std(moved[:, :SIZE], 0.3 * math.sqrt(9) * SIGMA * CLIP / BATCH)
    assert has_std(moved[:, SIZE:], 0.5 * math.sqrt(9) * SIGMA / BATCH)
    assert not has_std(moved[:, SIZE:], 0.9 * 0.5 * 3 * SIGMA / BATCH)


def test_each_site_gets_the_noise_of_its_own_plan(silent_backend: Any, make_phase: MakePhase) -> None:
    multipliers = (0.5, 2.0)
    jobs = [job_of([0], [2], search_phase(make_phase, 0.8, multipliers[client % 2]), client) for client in range(200)]
    moved = searched(silent_backend, jobs, torch.zeros(SIZE), learning_rate=1.0, gate_learning_rate=1.0)
    for which, multiplier in enumerate(multipliers):
        assert has_std(moved[which::2, :SIZE], multiplier * CLIP / BATCH)
        assert has_std(moved[which::2, SIZE:], multiplier / BATCH)


def test_noise_is_independent_between_weights_and_gates_sites_steps_and_rounds(
    silent_backend: Any, make_phase: MakePhase
) -> None:
    phase = search_phase(make_phase, 0.8, SIGMA)
    moves = torch.stack([released(silent_backend, phase, index) for index in range(3)])  # [rounds, steps, K, P + M]
    weights, gates = moves[..., :SIZE], moves[..., SIZE:]
    of_sites, of_rounds = gates.permute(2, 0, 1, 3).flatten(1), gates.flatten(1)
    assert are_uncorrelated(of_sites)
    assert are_uncorrelated(of_rounds)
    assert are_uncorrelated(gates.permute(1, 0, 2, 3).flatten(1))  # steps
    assert are_uncorrelated(weights.flatten(0, 2))
    for start in range(0, SIZE - MODULES, WIDTH):  # one draw would begin alike; others could be shifted by slots
        beside = weights[..., start : start + MODULES]
        assert are_uncorrelated(torch.stack([beside.flatten(), gates.flatten()]))
    shared = of_sites.clone()
    shared[1] = 0.5 * shared[0] + 0.5 * shared[1]
    assert not are_uncorrelated(shared), "half of a neighbour's noise would be noticed"


# --------------------------------------------------------------------------------------------------------- signal


def test_gates_of_the_modules_that_help_end_above_the_others(table_backend: Any, make_phase: MakePhase) -> None:
    """Each record's loss falls along a common gradient in ten modules; elsewhere records pull at random."""
    helpful, records = range(0, MODULES, 4), 400
    draw = torch.Generator().manual_seed(4)
    table = torch.randn(records, SIZE, generator=draw)
    for module in helpful:
        table[:, WIDTH * module : WIDTH * (module + 1)] += 1.5 * torch.randn(WIDTH, generator=draw)
    halves = np.random.default_rng(0).permutation(records).reshape(2, 2, -1)
    phase = search_phase(make_phase, 0.5, 0.0)
    found = searched(
        table_backend(table, WIDTHS),
        [job_of(*half, phase, client) for client, half in enumerate(halves.tolist())],
        torch.zeros(SIZE),
        num_steps=8,
        learning_rate=0.1,
        gate_learning_rate=1.0,
        shapes=Shapes(10_000),
    )
    for gates in found[:, SIZE:]:
        helping = torch.zeros(MODULES, dtype=torch.bool).index_fill_(0, torch.tensor(helpful), True)
        assert gates[helping].min() > gates[~helping].max()
        assert gates[helping].min() > 0


def test_gates_of_modules_of_a_real_model_that_cannot_help_stay_put(
    make_bench: Any, random_records: Any, make_phase: MakePhase
) -> None:
    """The first layer's attention leads nowhere; records are labelled by a word, which the other modules can learn."""
    bench = make_bench(
        "adapter.select=bilevel",
        "federation.rounds=5",
        'adapter.target_modules="query,key,value,up,down"',
        "model.head=frozen",
    )
    dataset = random_records([8] * 64)
    words = dataset.ids.reshape(64, 8)
    dataset = dataclasses.replace(dataset, labels=(words[:, 1] % 2).astype(np.int64))
    dead = [n for n, c in enumerate(bench.candidates) if c.layer == 0 and c.kind in ("query", "key", "value")]
    for name, module in bench.classifier.named_modules():
        if name.endswith("layer.0.attention.output.dense"):
            module.weight.data.zero_()
    found = search(
        bench.backend,
        dataset,
        [job_of(range(32), range(32, 64), search_phase(make_phase, 1.0, 0.0))],
        bench.initial_theta,
        torch.zeros(len(bench.candidates)),
        bench.gated,
        num_steps=10,
        learning_rate=0.1,
        gate_learning_rate=1.0,
        training=TRAINING,
        shapes=Shapes(512),
    )[0][bench.layout.size :]
    alive = [n for n in range(len(bench.candidates)) if n not in dead]
    assert len(dead) == 3
    assert (found[dead] == 0).all()
    assert (found[alive] != 0).all()
    assert found[alive].mean() > 0
