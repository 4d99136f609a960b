"""A client's whole data moves a round's sum by at most C, the sum has the noise that is charged, once, and n is public.

Statistics reject noise that is 10 % off; ε is compared with dp-accounting's own.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from fedlora.config import RunConfig
from fedlora.errors import BudgetRefused, DataError, PrivacyError, ProtocolError
from fedlora.privacy import accounting, client_level
from fedlora.privacy.accounting import Charge
from fedlora.privacy.client_level import ClientLevel, ServerNoise, SharedNoise, make_client_level
from fedlora.privacy.clipping import Clipping
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.noise import HostNoise
from fedlora.privacy.phases import FINETUNE
from fedlora.privacy.plan import PhasePlan, PrivacyPlan, make_plan
from fedlora.privacy.sampling import PoissonSampler
from fedlora.randomness import SecretRoot

C, SIGMA, ASKED, STEPS, P = 0.5, 1.3, 7, 4, 20_000
FALSE_ALARM = 1e-6
KINDS: list[type[ClientLevel]] = [ServerNoise, SharedNoise]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["server", "shared"])


def level(kind: type[ClientLevel], noise_multiplier: float = SIGMA) -> ClientLevel:
    return kind(clip_norm=C, noise_multiplier=noise_multiplier, cohort_size=ASKED, steps_per_round=STEPS)


def secret(*path: str | int) -> HostNoise:
    return HostNoise(SecretRoot.seeded(0).numpy(*path))


def moves(count: int = ASKED, *, size: int = P, length: float = 10 * C) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(count, size, dtype=torch.float64, generator=draw)
    return list(rows / rows.norm(dim=1, keepdim=True) * length)


def round_of(how: ClientLevel, own: list[Tensor], stream: int = 0) -> Tensor:
    """The mean that is released of a round, as the clients and the server make it together."""
    parts = [how.part(move, secret("client", stream, client)) for client, move in enumerate(own)]
    return how.mean(parts, secret("server", stream))


def looks_like(values: Tensor, std: float) -> bool:
    """Whether independent numbers have this standard deviation and mean 0. Of 20,000, 3 % off is seen for sure."""
    squares, count = float(values.square().sum()) / std**2, values.numel()
    spread = chi2.ppf(FALSE_ALARM, count) < squares < chi2.isf(FALSE_ALARM, count)
    return spread and abs(float(values.mean())) < 6 * std / math.sqrt(count)


# ---------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("length", [0.1 * C, C, 1.01 * C, 1e6 * C, 1e20])
def test_a_whole_move_is_cut_to_c_and_a_short_one_is_left(length: float) -> None:
    (move,) = moves(1, length=length)
    kept = level(ServerNoise).clipped(move)
    assert float(kept.norm()) <= C
    assert float(kept.norm()) == pytest.approx(min(length, C), rel=2e-6)
    assert torch.allclose(kept / kept.norm(), move / length, atol=1e-12)


@each_kind
def test_one_clip_over_all_slots_bounds_a_client_that_is_long_in_each(kind: type[ClientLevel]) -> None:
    """Slots cut one by one would add up to C √3."""
    move = torch.zeros(12)
    move[[0, 5, 11]] = 100.0
    kept = level(kind, 0.0).part(move, secret())
    assert float(kept.norm()) == pytest.approx(C, rel=2e-6)
    assert float(kept[0]) == pytest.approx(C / math.sqrt(3), rel=2e-6)


@each_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_a_move_that_is_not_finite_counts_as_zero_and_is_left_as_it_was(kind: type[ClientLevel], bad: float) -> None:
    move = torch.ones(5)
    move[2] = bad
    before = move.clone()
    how = level(kind, 0.0)
    assert torch.equal(how.part(move, secret()), torch.zeros(5, dtype=torch.float64))
    assert torch.equal(move, before) or math.isnan(bad)
    if kind is ServerNoise:
        rest = [torch.full((5,), 0.1)] * 2
        assert torch.equal(how.mean([*rest, move], secret()), how.mean([*rest, torch.zeros(5)], secret()))


@each_kind
def test_a_client_with_data_or_with_none_moves_the_mean_by_c_over_those_asked(kind: type[ClientLevel]) -> None:
    """Neither by 2C / n nor by C: what the noise on the sum is measured against is C."""
    how, own = level(kind, 0.0), moves(size=300)
    own = [own[0]] * ASKED  # all in one direction, where differences add up
    without = [torch.zeros_like(own[0]), *own[1:]]
    difference = round_of(how, own) - round_of(how, without)
    assert float(difference.norm()) * ASKED == pytest.approx(C, rel=1e-5)
    assert float(difference.norm()) * ASKED <= C


def test_the_server_clips_whatever_a_client_did() -> None:
    how = level(ServerNoise, 0.0)
    honest = [how.part(move, secret()) for move in moves(ASKED - 1, size=300)]
    hostile = moves(1, size=300, length=1e9)[0]
    difference = how.mean([*honest, hostile], secret()) - how.mean([*honest, torch.zeros(300)], secret())
    assert float(difference.norm()) * ASKED <= C * (1 + 1e-6)


# ------------------------------------------------------------------------------------------------------------- noise


def test_server_noise_is_sigma_c_on_the_sum_and_clients_add_none() -> None:
    how, own = level(ServerNoise), moves()
    for move in own:
        assert torch.equal(how.part(move, secret("client")), how.clipped(move)), "no noise of the client's own"
    noise = (round_of(how, own) - round_of(level(ServerNoise, 0.0), own)) * ASKED
    assert looks_like(noise, SIGMA * C)
    assert not looks_like(noise, 0.9 * SIGMA * C)
    assert not looks_like(noise, 1.1 * SIGMA * C)


def test_shared_noise_is_all_of_it_in_the_parts_of_all_but_one() -> None:
    """One client knows its own part: what it faces in the sum of the others is what is charged, and no less."""
    how, own = level(SharedNoise), moves()
    silent = level(SharedNoise, 0.0)
    for client, move in enumerate(own):
        of_one = how.part(move, secret("client", 0, client)) - silent.part(move, secret())
        assert looks_like(of_one, SIGMA * C / math.sqrt(ASKED - 1))
        noise = (round_of(how, own) - round_of(silent, own)) * ASKED
        unknown = noise - of_one
        assert looks_like(unknown, SIGMA * C)
        for wrong in (0.9, 1.1, 1 / math.sqrt(ASKED), math.sqrt(2)):
            assert not looks_like(unknown, wrong * SIGMA * C)
    assert looks_like(noise, SIGMA * C * math.sqrt(ASKED / (ASKED - 1)))


@each_kind
def test_noise_is_new_in_every_round_and_the_same_from_the_same_stream(kind: type[ClientLevel]) -> None:
    how, own = level(kind), moves(size=300)
    assert torch.equal(round_of(how, own), round_of(how, own))
    assert not torch.isclose(round_of(how, own), round_of(how, own, stream=1)).any()


@each_kind
def test_without_noise_the_mean_is_that_of_clipped_moves(kind: type[ClientLevel]) -> None:
    how, own = level(kind, 0.0), moves(size=50)
    assert torch.allclose(round_of(how, own), torch.stack(own).mean(dim=0) * C / (10 * C), rtol=1e-5, atol=1e-8)


# ------------------------------------------------------------------------------------------------- who did not answer


def test_the_divisor_is_who_was_asked_and_a_silent_client_counts_as_zero() -> None:
    how, own = level(ServerNoise), moves(size=300)
    silent = [*own[:-2], torch.zeros(300), torch.zeros(300)]
    assert torch.equal(how.mean(own[:-2], secret("server")), how.mean(silent, secret("server")))


@pytest.mark.parametrize("answered", range(1, ASKED))
def test_shared_noise_is_no_noise_without_everybody(answered: int) -> None:
    how = level(SharedNoise)
    parts = [how.part(move, secret(client)) for client, move in enumerate(moves(answered, size=10))]
    with pytest.raises(PrivacyError, match=rf"{answered} of {ASKED} clients answered.*client_noise=server") as refused:
        how.mean(parts, secret())
    assert "\n" not in str(refused.value)


@each_kind
@pytest.mark.parametrize("count", [0, ASKED + 1])
def test_nobody_has_more_than_one_part_of_the_sum(kind: type[ClientLevel], count: int) -> None:
    with pytest.raises(PrivacyError, match=rf"{count} moves of clients for a round that asks {ASKED}"):
        level(kind).mean(moves(count, size=10), secret())


@pytest.mark.parametrize("size", [1, 10, 300, P])
@pytest.mark.parametrize("noise_multiplier", [0.0, 0.1, SIGMA, 50.0])
def test_honest_parts_are_never_too_long_and_absurd_ones_are_refused(size: int, noise_multiplier: float) -> None:
    how = level(SharedNoise, noise_multiplier)
    for stream in range(20 if size < P else 1):
        own = moves(size=size)
        parts = [how.part(move, secret(stream, client)) for client, move in enumerate(own)]
        sent = [((10.0 + part).float() - 10.0) for part in parts]  # as vectors travel, beside the largest theta
        how.mean(sent, secret())
    std = noise_multiplier * C / math.sqrt(ASKED - 1)
    for absurd in (torch.full((size,), 3 * (C + 11 * std)), torch.full((size,), math.nan)):
        with pytest.raises(ProtocolError, match="longer than"):
            how.mean([*parts[1:], absurd], secret())


def test_what_others_know_of_shared_noise_is_taken_away() -> None:
    how = level(SharedNoise)
    assert isinstance(how, SharedNoise)
    assert how.noise_multiplier_of_part == pytest.approx(SIGMA / math.sqrt(ASKED - 1), rel=1e-12)
    assert how.noise_multiplier_against(0) == pytest.approx(SIGMA * math.sqrt(7 / 6), rel=1e-12)
    assert how.noise_multiplier_against(1) == pytest.approx(SIGMA, rel=1e-12)
    assert how.noise_multiplier_against(2) == pytest.approx(SIGMA * math.sqrt(5 / 6), rel=1e-12)
    assert how.noise_multiplier_against(6) == pytest.approx(how.noise_multiplier_of_part, rel=1e-12)
    assert how.noise_multiplier_against(100) == how.noise_multiplier_against(6), "its own part is always there"


def test_one_client_alone_has_nobody_to_share_with() -> None:
    with pytest.raises(PrivacyError, match=r"asks 1 client.*set privacy\.client_noise=server"):
        SharedNoise(clip_norm=C, noise_multiplier=SIGMA, cohort_size=1, steps_per_round=STEPS)


# -------------------------------------------------------------------------------------------------------- accounting


def config(*overrides: str) -> RunConfig:
    return RunConfig().with_overrides(
        *("privacy.unit=client", "model.head=frozen", "federation.clients=40", "federation.participation=0.25"),
        *("federation.rounds=12", "federation.local_steps=4", f"privacy.client_clip_norm={C}"),
        *overrides,
    )


def plan_of(asked: RunConfig, how: ClientLevel, rounds: int, num_examples: int = 500) -> PrivacyPlan:
    steps = {FINETUNE: rounds * asked.federation.local_steps}
    return make_plan(asked, num_examples=num_examples, num_steps=steps, client=3, client_level=how)


def composed(noise_multiplier: float, rounds: int, delta: float) -> float:
    """dp-accounting's own ε of so many Gaussian releases, none of them sampled."""
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    exact = PLDAccountant(value_discretization_interval=1e-4)
    event: Any = dp_event.GaussianDpEvent(noise_multiplier)
    return float(exact.compose(dp_event.SelfComposedDpEvent(event, rounds)).get_epsilon(delta))


@pytest.mark.parametrize(("sigma", "rounds", "golden"), [(1.0, 1, 4.37718), (3.0, 10, 4.65298), (5.0, 50, 6.57297)])
def test_rounds_cost_what_dp_accounting_says_of_unsampled_gaussians(sigma: float, rounds: int, golden: float) -> None:
    how = level(ServerNoise, sigma)
    assert how.charge(rounds * STEPS) == Charge(1.0, sigma, rounds)
    ours = accounting.epsilon([how.charge(rounds * STEPS)], 1e-5)
    assert ours == pytest.approx(golden, rel=2e-4)
    assert composed(sigma, rounds, 1e-5) * (1 - 1e-6) <= ours <= composed(sigma, rounds, 1e-5) * (1 + 1e-3)


def test_a_round_that_is_begun_is_charged_whole() -> None:
    assert [level(ServerNoise).charge(steps).num_steps for steps in (0, 1, STEPS, STEPS + 1)] == [0, 1, 1, 2]


@pytest.mark.parametrize("noise", ["server", "shared"])
@pytest.mark.parametrize("target", [1.0, 8.0])
def test_the_client_asked_most_often_meets_the_target_and_the_others_spend_less(target: float, noise: str) -> None:
    asked = config(f"privacy.epsilon={target}", f"privacy.client_noise={noise}", "federation.minimum_clients=10")
    how = make_client_level(asked, 6)
    assert type(how) is (ServerNoise if noise == "server" else SharedNoise)
    assert (how.clip_norm, how.cohort_size, how.steps_per_round) == (C, 10, 4)
    spent = [plan_of(asked, how, rounds).epsilon() for rounds in (0, 1, 3, 6)]
    assert spent == sorted(spent)
    assert (spent[0], 0.98 * target <= spent[-1] <= target) == (0.0, True)
    assert composed(how.noise_multiplier, 6, asked.privacy.delta) == pytest.approx(spent[-1], rel=1e-3)
    with pytest.raises(BudgetRefused, match="plan of client 3 would spend"):
        plan_of(asked, how, 7)


def test_sites_train_without_noise_and_are_charged_for_the_mean() -> None:
    asked = config("privacy.clip_norm=0.3", "privacy.clipping=automatic")
    plan = plan_of(asked, how := make_client_level(asked, 6), 6)
    (phase,) = plan.phases
    assert phase.mechanism == GaussianMechanism(0.0)
    assert phase.clipping == Clipping("automatic", 0.3), "records are clipped as before"
    assert phase.sampler.sampling_probability == asked.training.expected_batch_size / 500
    assert phase.charge(8) == Charge(1.0, how.noise_multiplier, 2)
    facts = plan.describe({FINETUNE: 12}, spent=1.25)
    assert (facts["unit"], facts["relation"], facts["epsilon"]) == ("client", "add/remove", 1.25)
    assert (facts["clip_norm"], facts["clipping"], facts["num_steps"]) == (C, "flat", 3)
    assert facts["sampling_probability"] == 1.0, "and so nothing of the number of records"
    assert facts["noise_multiplier"] == facts["effective_noise_multiplier"] == how.noise_multiplier
    (told,) = facts["phases"]
    again = Charge(told["sampling_probability"], told["effective_noise_multiplier"], told["num_steps"])
    assert (again, told["sensitivity"]) == (phase.charge(12), C)


def test_without_privacy_moves_are_clipped_and_epsilon_is_infinite() -> None:
    asked = config("privacy.epsilon=inf")
    how = make_client_level(asked, 6)
    assert (how.noise_multiplier, plan_of(asked, how, 6).epsilon()) == (0.0, math.inf)


def test_delta_is_compared_with_the_number_of_clients_not_of_records() -> None:
    with pytest.raises(DataError, match=r"0\.025 is not below 1/40, one over the number of clients"):
        make_client_level(config("privacy.delta=0.025"), 6)
    asked = config("privacy.delta=0.02")
    assert plan_of(asked, make_client_level(asked, 6), 6, num_examples=200).epsilon() <= 6


def test_a_remembered_sigma_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = make_client_level(config(), 6).noise_multiplier
    monkeypatch.setattr(client_level, "calibrate_noise_multiplier", lambda **_: 0.99 * right)
    with pytest.raises(BudgetRefused, match="Delete fedlora's cache folder"):
        make_client_level(config(), 6)


def test_a_plan_has_one_unit() -> None:
    how, records = make_client_level(config(), 6), RunConfig()
    with pytest.raises(PrivacyError, match=r"privacy\.unit = client, but of a protection of whole clients none"):
        make_plan(config(), num_examples=500, num_steps={FINETUNE: 4}, client=0)
    with pytest.raises(PrivacyError, match=r"privacy\.unit = record, but of a protection of whole clients one"):
        make_plan(records, num_examples=2000, num_steps={FINETUNE: 4}, client=0, client_level=how)
    with pytest.raises(PrivacyError, match="noise on steps"):
        PhasePlan(
            name=FINETUNE,
            sampler=PoissonSampler(0.1),
            clipping=Clipping("flat", 1.0),
            mechanism=GaussianMechanism(1.0),
            num_steps=4,
            client_level=how,
        )
