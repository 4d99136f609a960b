"""The auditor's estimators: they do not cry wolf, they have teeth, and they agree with others' numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from fedlora.privacy.accounting import Charge, epsilon
from fedlora.privacy.audit.bounds import (
    BoundMaker,
    clopper_pearson_lower,
    clopper_pearson_upper,
    epsilon_bound,
    gaussian_epsilon,
    gaussian_epsilon_bound,
    held_out_bound,
)
from fedlora.privacy.audit.finding import ERROR, Evidence, judge
from fedlora.privacy.audit.noise import ReleasedNoise, judge_noise
from fedlora.privacy.audit.one_run import one_run_bound, one_run_epsilon, one_run_p_value
from fedlora.privacy.audit.scores import log_likelihood_ratio

FALSE_ALARM = 1e-6


def most_failures(repetitions: int, error: float) -> int:
    """More than this many of `repetitions` bounds above the truth happen with probability below 1e-6 at `error`."""
    return int(binom.isf(FALSE_ALARM, repetitions, error))


# ---------------------------------------------------------------------------------------------------- exact intervals


@pytest.mark.parametrize("successes", [0, 1, 7, 99, 100])
def test_clopper_pearson_inverts_the_binomial_tails(successes: int) -> None:
    low = float(clopper_pearson_lower(np.array([successes]), 100, 0.01)[0])
    high = float(clopper_pearson_upper(np.array([successes]), 100, 0.01)[0])
    assert low == 0 if successes == 0 else binom.sf(successes - 1, 100, low) == pytest.approx(0.01)
    assert high == 1 if successes == 100 else binom.cdf(successes, 100, high) == pytest.approx(0.01)


@pytest.mark.parametrize("shift", [0.05, 0.5, 1.0, 2.0, 6.0])
@pytest.mark.parametrize("delta", [1e-8, 1e-5, 1e-2])
def test_epsilon_of_a_gaussian_is_the_accountants(shift: float, delta: float) -> None:
    accounted = epsilon([Charge(1.0, 1 / shift, 1)], delta)
    assert gaussian_epsilon(shift, delta) == pytest.approx(accounted, rel=3e-4, abs=1e-6)
    assert gaussian_epsilon(shift, delta) <= accounted


# ----------------------------------------------------------------------------------------------------- held-out bound


def randomised_response(draw: np.random.Generator, accuracy: float, trials: int) -> tuple[np.ndarray, np.ndarray]:
    return (draw.random(trials) > accuracy).astype(float), (draw.random(trials) < accuracy).astype(float)


def test_the_bound_is_above_the_truth_no_more_often_than_promised() -> None:
    """Randomised response has one event that reaches its ε exactly: the hardest case for a bound's validity.

    800 seeded repetitions at error 0.05; the test fails by chance with probability below 1e-6.
    """
    true = math.log(0.7 / 0.3)
    draw = np.random.default_rng(1)
    bounds = []
    for _ in range(800):
        without, with_record = randomised_response(draw, 0.7, 400)
        bounds.append(
            held_out_bound({"said": without}, {"said": with_record}, epsilon_bound, delta=0.0, error=ERROR).epsilon
        )
    assert sum(bound > true for bound in bounds) <= most_failures(800, ERROR)
    assert np.median(bounds) > 0.6 * true


@pytest.mark.parametrize("method", [epsilon_bound, gaussian_epsilon_bound])
def test_a_gaussian_is_not_accused_whatever_attack_is_picked(method: BoundMaker) -> None:
    """Many useless attacks beside the best one: choosing among them on the same trials would break the bound."""
    true = gaussian_epsilon(1.0, 1e-3)
    draw = np.random.default_rng(2)
    failures = 0
    for _ in range(120):
        worlds = [{"best": draw.normal(shift, 1, 300)} for shift in (0.0, 1.0)]
        for world in worlds:
            world.update({f"useless {number}": draw.normal(size=300) for number in range(4)})
        failures += held_out_bound(*worlds, method, delta=1e-3, error=ERROR).epsilon > true
    assert failures <= most_failures(120, ERROR)


def test_two_equal_worlds_show_nothing_much() -> None:
    draw = np.random.default_rng(3)
    shown = [
        held_out_bound(
            {"x": draw.normal(size=500)}, {"x": draw.normal(size=500)}, epsilon_bound, delta=0.0, error=ERROR
        ).epsilon
        for _ in range(300)
    ]
    assert sum(bound > 0 for bound in shown) <= most_failures(300, ERROR)


@pytest.mark.parametrize("method", [epsilon_bound, gaussian_epsilon_bound])
def test_the_direction_of_a_score_does_not_matter(method: BoundMaker) -> None:
    draw = np.random.default_rng(4)
    without, with_record = draw.normal(0, 1, 4000), draw.normal(2, 1, 4000)
    plain = held_out_bound({"x": without}, {"x": with_record}, method, delta=1e-5, error=ERROR)
    mirrored = held_out_bound({"x": -without}, {"x": -with_record}, method, delta=1e-5, error=ERROR)
    swapped = held_out_bound({"x": with_record}, {"x": without}, method, delta=1e-5, error=ERROR)
    assert plain.epsilon > 1.5
    assert mirrored.epsilon == pytest.approx(plain.epsilon, rel=0.15)
    assert swapped.epsilon == pytest.approx(plain.epsilon, rel=0.25)


def test_teeth_a_gaussian_with_nine_tenths_of_its_noise_is_refuted() -> None:
    claimed = gaussian_epsilon(1.0, 1e-5)
    draw = np.random.default_rng(5)
    for sigma, refuted in ((1.0, False), (0.9, True)):
        worlds = [{"x": draw.normal(shift, sigma, 40_000)} for shift in (0.0, 1.0)]
        assert (held_out_bound(*worlds, gaussian_epsilon_bound, delta=1e-5, error=ERROR).epsilon > claimed) is refuted


def test_scores_that_part_give_the_most_that_so_many_trials_can_show() -> None:
    shown = held_out_bound({"x": np.zeros(2000)}, {"x": np.ones(2000)}, epsilon_bound, delta=1e-5, error=ERROR)
    never = 1 - (ERROR / 2) ** (1 / 1000)
    assert shown.epsilon == pytest.approx(math.log((1 - never - 1e-5) / never))
    assert 0 < shown.threshold < 1


def test_scores_that_are_all_the_same_show_nothing() -> None:
    shown = held_out_bound({"x": np.zeros(200)}, {"x": np.zeros(200)}, epsilon_bound, delta=0.0, error=ERROR)
    assert shown.epsilon == 0
    assert math.isnan(shown.threshold)


# ------------------------------------------------------------------------------------------------------------ one run


@pytest.mark.parametrize(("canaries", "guesses"), [(10, 1), (100, 10), (1000, 100), (1000, 1000)])
@pytest.mark.parametrize("delta", [0.0, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("claimed", [0.0, 0.5, 2.0])
def test_p_value_is_the_theorems_sum(canaries: int, guesses: int, delta: float, claimed: float) -> None:
    """Theorem 5.2 term by term: 2 m δ times the largest mean mass of B just below v."""
    accuracy = math.exp(claimed) / (1 + math.exp(claimed))
    mass = [math.comb(guesses, k) * accuracy**k * (1 - accuracy) ** (guesses - k) for k in range(guesses + 1)]
    for correct in {0, guesses // 2, (3 * guesses) // 4, guesses}:
        slack = max([sum(mass[correct - i : correct]) / i for i in range(1, correct + 1)], default=0.0)
        wanted = min(1.0, sum(mass[correct:]) + 2 * canaries * delta * slack)
        got = one_run_p_value(canaries, guesses, correct, epsilon=claimed, delta=delta)
        assert got == pytest.approx(wanted, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("guesses", "correct", "thresholds", "published"),
    [(3376, 2807, 386, 1.13346), (4666, 4499, 374, 2.311945), (8233, 8223, 140, 4.395568)],
)
def test_bound_equals_that_of_jax_privacy(guesses: int, correct: int, thresholds: int, published: float) -> None:
    """`test_epsilon_one_run_close` of google-deepmind/jax_privacy: 10,000 scores a side at normal quantiles, shifted by
    1, 2 and 4, error 0.05, δ 1e-6. The counts are those at the best of the thresholds on the ROC's hull, among which
    it divides the error.
    """
    bound = one_run_epsilon(20_000, guesses, correct, delta=1e-6, error=0.05 / thresholds)
    assert bound == pytest.approx(published, rel=1e-5)


def test_without_delta_all_right_guesses_have_a_closed_form() -> None:
    """P[all r right] = (e^ε / (1 + e^ε))^r = error."""
    accuracy = 0.05 ** (1 / 50)
    assert one_run_epsilon(100, 50, 50, delta=0.0, error=0.05) == pytest.approx(math.log(accuracy / (1 - accuracy)))
    assert one_run_epsilon(100, 50, 25, delta=0.0, error=0.05) == 0


def test_delta_costs_some_of_the_bound() -> None:
    bounds = [one_run_epsilon(1000, 100, 95, delta=delta, error=0.05) for delta in (0.0, 1e-5, 1e-3, 0.3)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[2] > bounds[3] == 0


def test_one_run_does_not_accuse_randomised_response() -> None:
    """Every canary by its own randomised response: the worst case of the theorem. Fails by chance below 1e-6."""
    true, draw, failures, bounds = 1.0, np.random.default_rng(6), 0, []
    for _ in range(500):
        included = draw.random(200) < 0.5
        kept = draw.random(200) < math.exp(true) / (1 + math.exp(true))
        scores = np.where(kept, included, ~included) + draw.uniform(0, 0.5, 200)
        bounds.append(one_run_bound(scores, included, delta=0.0, error=ERROR).epsilon)
        failures += bounds[-1] > true
    assert failures <= most_failures(500, ERROR)
    assert np.median(bounds) > 0.25


def test_one_run_sees_canaries_in_the_clear() -> None:
    included = np.arange(300) % 2 == 0
    run = one_run_bound(included.astype(float), included, delta=1e-5, error=ERROR)
    assert run.correct == run.guesses
    assert run.epsilon > 3


# ------------------------------------------------------------------------------------------------- scores and verdicts


@pytest.mark.parametrize("probability", [0.1, 1.0])
def test_likelihood_ratio_is_that_of_the_two_laws(probability: float) -> None:
    released = np.random.default_rng(7).normal(size=(5, 3))
    without = norm.logpdf(released, 0, 0.8).sum(axis=1)
    mixed = (1 - probability) * norm.pdf(released, 0, 0.8) + probability * norm.pdf(released, 1, 0.8)
    got = log_likelihood_ratio(released, sampling_probability=probability, noise_multiplier=0.8)
    assert np.allclose(got, np.log(mixed).sum(axis=1) - without)


def gaussian_evidence(claimed: float, method: str = "events", trials: int = 20_000) -> Evidence:
    draw = np.random.default_rng(8)
    return Evidence(
        level="mechanism",
        name="planted",
        claimed=claimed,
        delta=1e-5,
        without={"x": draw.normal(0, 1, trials)},
        with_record={"x": draw.normal(2, 1, trials)},
        method=method,  # type: ignore[arg-type]
    )


def test_verdicts() -> None:
    low, high, none = judge([gaussian_evidence(1.0), gaussian_evidence(20.0), gaussian_evidence(math.inf)])
    assert (low.verdict, high.verdict, none.verdict) == ("contradicted", "consistent", "no claim")
    assert low.contradicts
    assert not high.contradicts
    assert not none.contradicts


def test_a_longer_table_is_judged_more_strictly() -> None:
    alone, many = judge([gaussian_evidence(9.0)])[0], judge([gaussian_evidence(9.0)] * 20)[0]
    assert alone.confidence == 0.95
    assert many.confidence == pytest.approx(1 - 0.05 / 20)
    assert many.bound < alone.bound


# ---------------------------------------------------------------------------------------------------- released noise


def noise_of(draw: np.random.Generator, size: int = 60, widening: float = 1.0) -> list[ReleasedNoise]:
    """Two clients' two rounds of a phase of `size` numbers, and one release of fewer in another phase."""
    names = [("one", client, 0, 12) for client in range(2)]
    names += [("two", client, round_index, size) for round_index in (1, 2) for client in range(2)]
    return [
        ReleasedNoise(
            phase=phase,
            client=client,
            round_index=index,
            values=widening * draw.normal(size=count),
            rank=count,
            widening=widening,
        )
        for phase, client, index, count in names
    ]


@pytest.mark.parametrize("widening", [1.0, 1.3])
def test_sound_noise_is_seldom_refuted(widening: float) -> None:
    draw = np.random.default_rng(9)
    failures = 0
    for _ in range(1000):
        finding = judge_noise(noise_of(draw, widening=widening), level="x", name="x", error=ERROR)
        failures += finding.contradicts
    assert failures <= most_failures(1000, ERROR)
    assert failures or widening > 1  # the tests are not so cautious that they see nothing


def test_each_fault_of_noise_is_named() -> None:
    draw = np.random.default_rng(10)
    sound = noise_of(draw, 5000)
    weak = [dataclasses.replace(part, values=0.9 * part.values) for part in sound]
    silent = [*sound[:-1], dataclasses.replace(sound[-1], values=np.zeros(5000))]
    again = [*sound[:-1], dataclasses.replace(sound[-1], values=sound[-2].values)]
    begun_again = [
        *sound[:-1],
        dataclasses.replace(sound[-1], values=np.append(sound[0].values, draw.normal(size=4988))),
    ]
    found = [judge_noise(parts, level="x", name="x", error=1e-5) for parts in (sound, weak, silent, again, begun_again)]
    assert [finding.contradicts for finding in found] == [False, True, True, True, True]
    assert "standard deviation in phase two is 0.90" in found[1].what
    assert "client 1, round 2" in found[2].what
    assert found[3].what == "correlation of client 0, round 2 (two) and client 1, round 2 (two) is 1.000"
    assert found[4].what == "correlation of client 0, round 0 (one) and client 1, round 2 (two) is 1.000"
