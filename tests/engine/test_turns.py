"""`train` under a division into turns: what is clipped together, what gets noise, what moves, what is remembered."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.adapters.methods import METHODS, Turn
from fedlora.adapters.slots import AdapterLayout
from fedlora.config import TrainingConfig
from fedlora.data.encode import EncodedDataset
from fedlora.engine.batching import Shapes
from fedlora.engine.training import Division, TrainedRow, TrainingJob, train
from fedlora.errors import PrivacyError
from fedlora.federation.workbench import Workbench
from fedlora.privacy.mechanisms.gredp import GReDPMechanism
from fedlora.privacy.noise import HostNoise
from fedlora.privacy.plan import PhasePlan
from fedlora.privacy.projection import LowPass
from fedlora.randomness import SecretRoot
from tests.engine.reference import random_theta

LENGTHS = [5, 12, 3, 9, 12, 4, 7, 6]
BATCH = 4
SGD = TrainingConfig(optimizer="sgd", expected_batch_size=BATCH)
EVERY_METHOD = [*METHODS]
NOBODY = np.empty(0, np.int64)
B, A = Turn(("B",)), Turn(("A",))


def job_of(phase: PhasePlan, records: np.ndarray, secret: int = 0, **more: Any) -> TrainingJob:
    root = SecretRoot.seeded(secret)
    return TrainingJob(records=records, phase=phase, sampling=root.numpy("s"), noise=HostNoise(root.numpy("n")), **more)


class Silent:
    """A back end whose gradients are zero: what moves a vector is the noise and nothing else."""

    fuses_clients = True

    def __init__(self, layout: AdapterLayout) -> None:
        self.layout, self.slot_sizes = layout, tuple(slot.size for slot in layout.slots)
        self.dataset = EncodedDataset(
            ids=np.zeros(4, np.int32),
            starts=np.arange(4),
            lengths=np.ones(4, np.int64),
            labels=np.zeros(4, np.int64),
            pad_token_id=0,
        )

    def gradients(
        self, theta: Tensor, batch: Any, labels: Any, owner: Tensor, turn: Turn | None = None
    ) -> list[Tensor]:
        return [
            torch.zeros(len(owner), slot.size) for slot in self.layout.slots if turn is None or slot.part in turn.parts
        ]

    def logits(self, theta: Tensor, batch: Any) -> Tensor:
        raise NotImplementedError

    def detach(self) -> None:
        raise NotImplementedError


def wide_layout(rank: int = 4, modules: int = 6, width: int = 250) -> AdapterLayout:
    shapes: dict[str, tuple[int, ...]] = {f"m{number}/B": (width, rank) for number in range(modules)}
    shapes |= {"head:out/weight": (2, 900), "head:out/bias": (2,)}
    shapes |= {f"m{number}/A": (rank, width) for number in range(modules)}
    return AdapterLayout.build(shapes, method="lora", rank=rank, alpha=8.0)


LAYOUT = wide_layout()


def noise_alone(phase: PhasePlan, turns: Sequence[Turn], **how: Any) -> TrainedRow:
    """Of a client without records."""
    settings: dict[str, Any] = {"num_steps": len(turns), "learning_rate": 0.5, "training": SGD, "rates": {}}
    settings |= how
    division = Division(LAYOUT, tuple(turns), settings.pop("rates"))
    job = job_of(phase, NOBODY, active=settings.pop("active", None))
    backend = Silent(LAYOUT)
    start = settings.pop("theta", torch.zeros(LAYOUT.size))
    (row,) = train(backend, backend.dataset, [job], start, shapes=Shapes(9), division=division, **settings)
    return row


def test_a_division_of_other_slots_than_the_back_end_has_is_refused(make_phase: Any) -> None:
    other, backend = wide_layout(rank=3), Silent(LAYOUT)
    job = job_of(make_phase(1.0, 0.5), NOBODY)
    with pytest.raises(PrivacyError, match="other slots than the back end's"):
        train(
            backend,
            backend.dataset,
            [job],
            torch.zeros(other.size),
            num_steps=1,
            learning_rate=0.5,
            training=SGD,
            shapes=Shapes(9),
            division=Division(other, (Turn(other.parts),)),
        )


# ---------------------------------------------------------------------------------------------------- clipped together


def turns_of(bench: Workbench) -> list[Turn]:
    """All that some step of the run trains."""
    return [*dict.fromkeys(turn for entry in bench.schedule for turn in entry.turns)]


def moved(bench: Workbench, dataset: EncodedDataset, phase: PhasePlan, records: np.ndarray, turn: Turn) -> Tensor:
    """The sum that a step of `turn` at one client makes of its clipped records, [P] float64."""
    theta = random_theta(bench.layout, 1)[0]
    division = Division(bench.layout, (turn,))
    (row,) = train(
        bench.backend,
        dataset,
        [job_of(phase, records)],
        theta,
        num_steps=1,
        learning_rate=1.0,
        training=SGD,
        shapes=Shapes(60),
        division=division,
    )
    return (theta.double() - row.theta.double()) * BATCH


@pytest.mark.parametrize("kind", ["flat", "automatic"])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_record_is_clipped_over_all_that_the_step_trains(
    make_bench: Any, random_records: Any, make_phase: Any, method: str, kind: str
) -> None:
    """Not factor by factor, and not over what it does not train."""
    bench = make_bench(f"adapter.method={method}", "model.head=trained", "privacy.epsilon=inf")
    dataset = random_records(LENGTHS)
    batch, labels = dataset.batch(np.arange(len(LENGTHS)))
    theta, owner = random_theta(bench.layout, 1), torch.zeros(len(LENGTHS), dtype=torch.int64)
    for turn in turns_of(bench):
        own = bench.layout.positions(turn.parts)
        every = torch.cat(bench.backend.gradients(theta, batch, labels, owner, turn), dim=1).double()
        bound = float(every.norm(dim=1).median())
        factors = bound / every.norm(dim=1) if kind == "automatic" else (bound / every.norm(dim=1)).clamp(max=1.0)
        wanted = torch.zeros(bench.layout.size, dtype=torch.float64)
        wanted[own] = (every * factors[:, None]).sum(dim=0)
        got = moved(bench, dataset, make_phase(1.0, 0.0, bound, kind), np.arange(len(LENGTHS)), turn)
        assert (got - wanted).norm() < (0.05 if kind == "automatic" else 1e-4) * wanted.norm()
        untouched = torch.ones(bench.layout.size, dtype=torch.bool)
        untouched[own] = False
        assert (got[untouched] == 0).all()


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_one_record_more_or_less_moves_a_step_by_at_most_the_clip_norm(
    make_bench: Any, random_records: Any, make_phase: Any, method: str
) -> None:
    bench = make_bench(f"adapter.method={method}", "model.head=trained", "privacy.epsilon=inf")
    dataset, everyone = random_records(LENGTHS), np.arange(len(LENGTHS))
    phase = make_phase(1.0, 0.0, 0.05)  # below every gradient's norm
    for turn in turns_of(bench):
        whole = moved(bench, dataset, phase, everyone, turn)
        for left_out in everyone[::3]:
            less = moved(bench, dataset, phase, np.delete(everyone, left_out), turn)
            assert (whole - less).norm() == pytest.approx(0.05, rel=1e-3)


# --------------------------------------------------------------------------------------------------------------- noise


STEPS: dict[str, tuple[Turn, ...]] = {
    "all at once": (Turn(("B", "head", "A")),),
    "two steps of all": (Turn(("B", "head", "A")), Turn(("B", "head", "A"))),
    "B": (B,),
    "A": (A,),
    "B, then A": (B, A),
    "B and head, then A and head": (Turn(("B", "head")), Turn(("A", "head"))),
    "A without its head": (Turn(("A",), ("B",)),),
}


@pytest.mark.parametrize("rate_of_a", [1.0, 4.0, 0.25])
@pytest.mark.parametrize("steps", STEPS)
def test_every_coordinate_that_is_trained_gets_all_of_the_noise_and_no_other_any(
    make_phase: Any, steps: str, rate_of_a: float
) -> None:
    """1,800 numbers a part at least: a share of 0.1 of the deviation is six of its own."""
    sigma, clip_norm, rate, turns = 1.7, 0.3, 0.5, STEPS[steps]
    row = noise_alone(make_phase(0.3, sigma, clip_norm), turns, learning_rate=rate, rates={"A": rate_of_a})
    for part in LAYOUT.parts:
        number = sum(part in turn.parts for turn in turns)
        own = row.theta[LAYOUT.span(part)].double()
        wanted = rate * (rate_of_a if part == "A" else 1.0) * sigma * clip_norm / BATCH * math.sqrt(number)
        if number == 0:
            assert (own == 0).all()
        else:
            assert float(own.std()) == pytest.approx(wanted, rel=5 / math.sqrt(2 * len(own)))
            assert 5 / math.sqrt(2 * len(own)) < 0.1
            assert abs(float(own.mean())) < 5 * wanted / math.sqrt(len(own))


def test_the_noise_of_factors_is_independent(make_phase: Any) -> None:
    theta = noise_alone(make_phase(0.3, 1.0, 1.0), STEPS["B, then A"]).theta
    parts = torch.stack([theta[LAYOUT.span(part)] for part in "AB"]).double()
    assert abs(float(torch.corrcoef(parts)[0, 1])) < 5 / math.sqrt(parts.shape[1])
    whole = noise_alone(make_phase(0.3, 1.0, 1.0), STEPS["all at once"]).theta
    parts = torch.stack([whole[LAYOUT.span(part)] for part in "AB"]).double()
    assert abs(float(torch.corrcoef(parts)[0, 1])) < 5 / math.sqrt(parts.shape[1])


@pytest.mark.parametrize("over", ["slot", "flat"])
def test_gredp_transforms_the_slots_of_the_turn(make_phase: Any, over: Any) -> None:
    mechanism = GReDPMechanism(1.3, over=over)
    phase = dataclasses.replace(make_phase(0.3, 1.0, 0.5), mechanism=mechanism)
    for turn in (B, A, Turn(("B", "head"))):
        own = LAYOUT.only(turn.parts)
        sizes = [slot.size for slot in own.slots]
        row = noise_alone(phase, [turn], learning_rate=1.0)
        source = HostNoise(SecretRoot.seeded(0).numpy("n"))
        nothing = torch.zeros(own.size, dtype=torch.float64)
        wanted = mechanism.privatize(nothing, sensitivity=0.5, noise=source, slot_sizes=sizes)
        assert torch.allclose(row.theta[LAYOUT.positions(turn.parts)], -wanted / BATCH, atol=1e-7)


def test_a_low_pass_is_of_the_slots_of_the_turn(make_phase: Any) -> None:
    low = LowPass(0.3)
    phase = dataclasses.replace(make_phase(0.3, 1.0, 0.5), projection=low)
    for turn in (B, A):
        theta = noise_alone(phase, [turn]).theta
        for slot in LAYOUT.slots:
            part = LAYOUT.view(theta, slot).flatten()
            assert torch.allclose(low(part), part, atol=1e-6)
            assert bool(part.any()) == (slot.part in turn.parts)


# ---------------------------------------------------------------------------------------------------------- what moves


@pytest.mark.parametrize("noise_filter", ["none", "doppler", "disk", "james_stein", "binomial"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_what_a_step_does_not_train_does_not_move(make_phase: Any, optimizer: Any, noise_filter: Any) -> None:
    """Neither by momentum nor by decay nor by a filter's memory of its own turn."""
    training = TrainingConfig(
        optimizer=optimizer, expected_batch_size=BATCH, weight_decay=0.1, noise_filter=noise_filter, filter_gain=0.5
    )
    start = random_theta(LAYOUT, 1)[0]
    rows = [
        noise_alone(make_phase(0.3, 1.0, 1.0), (B, A), num_steps=steps, training=training, theta=start).theta
        for steps in range(1, 5)
    ]
    for step, (before, after) in enumerate(zip([start, *rows], rows, strict=False)):
        trained, other = ("B", "A") if step % 2 == 0 else ("A", "B")
        assert torch.equal(before[LAYOUT.span(other)], after[LAYOUT.span(other)])
        assert torch.equal(before[LAYOUT.span("head")], after[LAYOUT.span("head")])
        assert not torch.equal(before[LAYOUT.span(trained)], after[LAYOUT.span(trained)])


# ------------------------------------------------------------------------------------------------------- smaller ranks


def active_of(rank: int) -> Tensor:
    active = torch.zeros(LAYOUT.size, dtype=torch.bool)
    active[LAYOUT.positions(LAYOUT.parts, rank)] = True
    return active


@pytest.mark.parametrize("turns", [(Turn(("B", "head", "A")),), (B, A)])
def test_noise_beyond_a_smaller_rank_is_dropped_and_within_it_left_alone(
    make_phase: Any, turns: tuple[Turn, ...]
) -> None:
    phase, active = make_phase(0.3, 1.0, 1.0), active_of(2)
    whole, cut = (noise_alone(phase, turns, active=mask).theta for mask in (None, active))
    assert torch.equal(cut[active], whole[active])
    assert (cut[~active] == 0).all()
    assert (whole[LAYOUT.span("A")] != 0).all()


@pytest.mark.parametrize("noise_filter", ["none", "doppler", "disk", "james_stein", "binomial"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_beyond_a_smaller_rank_all_stays_zero(make_phase: Any, optimizer: Any, noise_filter: Any) -> None:
    training = TrainingConfig(
        optimizer=optimizer, expected_batch_size=BATCH, weight_decay=0.1, noise_filter=noise_filter, filter_gain=0.5
    )
    active = active_of(2)
    start = random_theta(LAYOUT, 1)[0] * active
    turns = (Turn(("B", "head", "A")),)
    row = noise_alone(make_phase(0.3, 1.0, 1.0), turns, num_steps=3, training=training, theta=start, active=active)
    assert (row.theta[~active] == 0).all()


@pytest.mark.parametrize("method", ["flora", "hetlora"])
def test_a_smaller_rank_changes_no_sensitivity_and_loses_no_signal(
    make_bench: Any, random_records: Any, make_phase: Any, method: str
) -> None:
    bench = make_bench(f"adapter.method={method}", "adapter.ranks='2,4'", "model.head=trained", "privacy.epsilon=inf")
    dataset, active = random_records(LENGTHS), bench.active(0)
    theta = random_theta(bench.layout, 1)[0] * active
    sums = []
    for records in (np.arange(8), np.arange(1, 8)):
        for mask in (active, None):
            job = job_of(make_phase(1.0, 0.0, 0.05), records, active=mask)
            (row,) = train(
                bench.backend,
                dataset,
                [job],
                theta,
                num_steps=1,
                learning_rate=1.0,
                training=SGD,
                shapes=Shapes(60),
                division=Division(bench.layout, (Turn(bench.layout.parts),)),
            )
            sums.append((theta.double() - row.theta.double()) * BATCH)
    with_mask, without_mask, less, _ = sums
    assert torch.equal(with_mask, without_mask), "beyond the rank there is no gradient"
    assert (with_mask - less).norm() == pytest.approx(0.05, rel=1e-3)


# --------------------------------------------------------------------------------------------------------- remembering


def test_a_part_that_waits_for_a_round_keeps_its_state(make_phase: Any) -> None:
    """rolora: A's moments of round 1 are those that round 3 goes on from, whatever round 2 did with B."""
    training = TrainingConfig(optimizer="adam", expected_batch_size=BATCH)
    phase, backend = make_phase(0.3, 1.0, 1.0), Silent(LAYOUT)
    theta, state, seen = torch.zeros(LAYOUT.size), None, []
    for number, turn in enumerate((B, A, B, A)):
        job = job_of(phase, NOBODY, secret=number, optimizer_state=state)
        (row,) = train(
            backend,
            backend.dataset,
            [job],
            theta,
            num_steps=2,
            learning_rate=0.1,
            training=training,
            shapes=Shapes(9),
            division=Division(LAYOUT, (turn,)),
        )
        theta, state = row.theta, row.optimizer_state
        seen.append({key: value.clone() for key, value in row.optimizer_state.items()})
    assert float(seen[2]["B/step"]) == 4
    assert float(seen[3]["A/step"]) == 4
    for waiting, number in (("B", 1), ("A", 2), ("B", 3)):
        for key in (f"{waiting}/exp_avg", f"{waiting}/exp_avg_sq"):
            assert torch.equal(seen[number][key], seen[number - 1][key])


def test_a_runs_sites_remember_both_factors(make_federation: Any) -> None:
    federation = make_federation(
        "adapter.method=rolora", "training.optimizer=adam", "training.keep_state=true", "training.learning_rate=0.01"
    )
    federation.server().run(federation.start())  # three rounds of two steps: B, A, B
    for site in federation.sites:
        assert {key: float(site.optimizer_state[key]) for key in ("B/step", "A/step")} == {"B/step": 4, "A/step": 2}
