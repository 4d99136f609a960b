"""ε against three independent sources: dp-accounting's own accountant, Opacus' PRV and the analytic Gaussian."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedlora.errors import ConfigError
from fedlora.privacy import accounting
from fedlora.privacy.accounting import Charge, epsilon, epsilon_curve, epsilon_with, event
from fedlora.privacy.units import Guarantee, rounded_up

DELTA = 1e-5
PROTOTYPE = Charge(1.0, 20.0, 1)
ROUND = Charge(0.02, 1.0, 10)

# (q, steps, ε) -> σ by dp-accounting's PLD at interval 1e-4, δ = 1e-5; three digits, so ε within the slope of that.
GOLDEN = [
    (0.001, 1000, 1, 0.641),
    (0.001, 1000, 6, 0.419),
    (0.01, 1000, 1, 1.415),
    (0.01, 1000, 3, 0.814),
    (0.01, 1000, 6, 0.643),
    (0.05, 1000, 3, 2.352),
    (0.1, 1000, 6, 2.55),
    (0.2, 500, 1, 16.76),
    (0.2, 500, 6, 3.53),
]

# Modest blocks, so that a hundred prices take seconds.
CHARGES = st.builds(
    Charge,
    st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    st.floats(0.7, 10.0),
    st.integers(1, 100),
)


@pytest.mark.parametrize(("probability", "steps", "wanted", "sigma"), GOLDEN)
def test_golden_numbers(probability: float, steps: int, wanted: float, sigma: float) -> None:
    price = epsilon([Charge(probability, sigma, steps)], DELTA)
    assert price == pytest.approx(wanted, rel=0.012)
    assert epsilon([Charge(probability, 0.9 * sigma, steps)], DELTA) > 1.08 * price


def test_composition_is_what_dp_accounting_says() -> None:
    from dp_accounting.pld import PLDAccountant

    charges = [PROTOTYPE, Charge(0.02, 1.0, 200), Charge(0.05, 2.0, 100), Charge(1.0, 15.0, 3)]
    exact = PLDAccountant(value_discretization_interval=2e-5).compose(event(charges)).get_epsilon(DELTA)
    assert epsilon(charges, DELTA) == pytest.approx(exact, rel=3e-4)
    assert epsilon(charges, DELTA) >= exact * (1 - 1e-6)


@pytest.mark.parametrize(("probability", "sigma", "steps"), [(0.01, 1.0, 1000), (0.05, 2.0, 300), (0.2, 6.0, 100)])
def test_agrees_with_opacus_prv_and_stays_below_rdp(probability: float, sigma: float, steps: int) -> None:
    from opacus.accountants import PRVAccountant

    prv = PRVAccountant()
    prv.history = [(sigma, probability, steps)]
    charges = [Charge(probability, sigma, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opacus = prv.get_epsilon(delta=DELTA)
    assert epsilon(charges, DELTA) == pytest.approx(opacus, rel=0.01)
    assert epsilon(charges, DELTA) < epsilon(charges, DELTA, "rdp")


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (4.0, 1), (20.0, 1), (10.0, 25), (0.3, 1)])
def test_unsampled_gaussian_is_the_analytic_one(sigma: float, steps: int) -> None:
    """Balle and Wang (2018), Theorem 8, with sensitivity √n for n steps."""
    shift = math.sqrt(steps) / sigma

    def excess_delta(bound: float) -> float:
        return float(
            norm.cdf(shift / 2 - bound / shift) - math.exp(bound) * norm.cdf(-shift / 2 - bound / shift) - DELTA
        )

    exact = brentq(excess_delta, 0, 100, xtol=1e-9)
    price = epsilon([Charge(1.0, sigma, steps)], DELTA)
    assert exact * (1 - 1e-9) <= price <= exact * (1 + 1e-3)


@settings(max_examples=15)
@given(CHARGES)
def test_monotone(charge: Charge) -> None:
    q, sigma, steps = charge.sampling_probability, charge.noise_multiplier, charge.num_steps
    price = epsilon([charge], DELTA)
    assert epsilon([Charge(q / 1.5, sigma, steps)], DELTA) < price
    assert epsilon([Charge(q, 1.1 * sigma, steps)], DELTA) < price
    assert epsilon([Charge(q, sigma, 2 * steps)], DELTA) > price
    assert epsilon([charge], DELTA * 10) < price
    assert epsilon([charge, PROTOTYPE], DELTA) > price


def test_order_and_division_of_the_charges_do_not_matter() -> None:
    whole = epsilon([PROTOTYPE, Charge(0.02, 1.0, 30)], DELTA)
    assert epsilon([ROUND, PROTOTYPE, ROUND, Charge(0.5, 1.0, 0), ROUND], DELTA) == whole


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon([], DELTA) == epsilon([Charge(0.1, 1.0, 0)], DELTA) == epsilon([Charge(0.1, 0.0, 0)], DELTA) == 0
    for accountant in ("pld", "rdp"):
        assert epsilon([ROUND, Charge(0.1, 0.0, 1)], DELTA, accountant) == math.inf
    assert epsilon([Charge(0.1, 1e-300, 1)], DELTA) == math.inf
    assert epsilon([Charge(0.1, 1e300, 1)], DELTA) == 0


@pytest.mark.parametrize("sigma", [0.001, 0.01, 0.1, 0.25])
@pytest.mark.parametrize("probability", [1e-5, 0.5, 1.0])
def test_little_noise_is_priced_finitely_and_above_the_gaussians_mean(probability: float, sigma: float) -> None:
    """Removing a record whose every batch holds it has loss 1/2σ² on average; RDP bounds it from above."""
    charges = [Charge(probability, sigma, 2)]
    price = epsilon(charges, DELTA)
    assert math.isfinite(price)
    assert price <= epsilon(charges, DELTA, "rdp") * (1 + 1e-9)
    if probability == 1:
        assert price > sigma**-2


@pytest.mark.parametrize("delta", [1e-12, 1e-15])
def test_a_delta_near_float_rounding_is_priced_upwards(delta: float) -> None:
    """FFT rounding alone may make ε too small here: on a grid of 2e-4, 1.8907 where the finer ones say 1.8927."""
    price = epsilon([Charge(0.01, 1.415, 1000)], delta)
    assert 1.8927 < price <= epsilon([Charge(0.01, 1.415, 1000)], delta, "rdp")


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_curve_is_what_every_prefix_costs(accountant: str) -> None:
    per_round = [[PROTOTYPE], *[[ROUND]] * 30]
    curve = epsilon_curve(per_round, DELTA, accountant)
    assert len(curve) == 31
    assert curve == sorted(curve)
    assert curve[-1] == epsilon([c for charges in per_round for c in charges], DELTA, accountant)
    for rounds in (1, 2, 11, 30):
        prefix = [charge for charges in per_round[:rounds] for charge in charges]
        assert curve[rounds - 1] == pytest.approx(epsilon(prefix, DELTA, accountant), rel=5e-3)
        assert curve[rounds - 1] >= epsilon(prefix, DELTA, accountant) * (1 - 2e-4)  # two upper bounds of one number


@pytest.mark.parametrize("charges", [(ROUND,), (PROTOTYPE,), (PROTOTYPE, ROUND, Charge(0.3, 4.0, 50))])
@pytest.mark.parametrize("delta", [1e-2, DELTA, 1e-9])
def test_a_guess_leads_to_the_epsilon_of_dp_accounting(charges: tuple[Charge, ...], delta: float) -> None:
    for interval in (1e-4 * 2**3, 1e-4 * 2**6):
        spent = accounting._compose(charges, interval)
        true = spent.get_epsilon_for_delta(delta)
        for guess in (-1.0, 0.0, 0.5 * true, true - interval, true, true + interval, 2 * true + 1, 1e3):
            assert accounting._epsilon_near(spent, delta, interval, guess) == pytest.approx(true, rel=1e-9, abs=1e-12)


def test_curve_of_unusual_runs() -> None:
    assert epsilon_curve([], DELTA) == []
    assert epsilon_curve([[], []], DELTA) == [0, 0]
    open_release = Charge(0.1, 0.0, 1)
    curve = epsilon_curve([[], [ROUND], [open_release], [ROUND]], DELTA)
    assert curve == [0, epsilon([ROUND], DELTA), math.inf, math.inf]
    near_rounding = epsilon_curve([[ROUND]] * 3, 1e-14)
    assert near_rounding[-1] == epsilon([ROUND] * 3, 1e-14)


@pytest.mark.parametrize(
    "values", [(0.0, 1.0, 1), (1.1, 1.0, 1), (0.1, -1.0, 1), (0.1, math.nan, 1), (0.1, math.inf, 1), (0.1, 1.0, -1)]
)
def test_impossible_charges_are_refused(values: tuple[float, float, int]) -> None:
    with pytest.raises(ConfigError, match="wanted"):
        Charge(*values)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError, match="delta"):
        epsilon([ROUND], delta)


@pytest.mark.parametrize("accountant", ["gdp", "clt", "prv", ""])
def test_unsound_accountants_are_not_offered(accountant: str) -> None:
    with pytest.raises(ConfigError, match="wanted one of pld, rdp"):
        epsilon([ROUND], DELTA, accountant)


def test_reading_the_module_costs_no_numerics() -> None:
    code = (
        "import sys, fedlora.privacy.accounting, fedlora.privacy.calibration, fedlora.privacy.units;"
        "print([m for m in ('torch', 'numpy', 'scipy', 'dp_accounting') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_printed_guarantee_names_all_it_rests_on() -> None:
    text = str(Guarantee(epsilon=5.99861, delta=DELTA, accountant="pld"))
    for part in ("5.999", "1e-05", "record", "add/remove", "PLD"):
        assert part in text
    assert "no guarantee" in str(Guarantee(epsilon=math.inf, delta=DELTA, accountant="pld"))
    assert "seeded" in str(Guarantee(epsilon=1.0, delta=DELTA, accountant="pld", noise_seeded=True))


@given(st.floats(1e-6, 1e6))
def test_rounding_for_print_never_flatters(value: float) -> None:
    shown = rounded_up(value)
    assert value * (1 - 1e-9) <= shown <= value * 1.002


# --- one who pays round by round -------------------------------------------------------------------------------------

KINDS = st.lists(CHARGES, min_size=0, max_size=3)


@settings(max_examples=8)
@given(KINDS, st.lists(CHARGES, min_size=1, max_size=2))
def test_paying_by_round_costs_what_all_costs_together(earlier: list[Charge], new: list[Charge]) -> None:
    from dp_accounting.pld import PLDAccountant

    price = epsilon_with(earlier, new, DELTA)
    exact = PLDAccountant(value_discretization_interval=2e-4).compose(event([*earlier, *new])).get_epsilon(DELTA)
    finer = epsilon([*earlier, *new], DELTA)
    assert price == pytest.approx(finer, rel=1e-3)
    assert price >= min(exact, finer) * (1 - 1e-4), "two grids may differ by this much; neither is below the true ε"
    assert price >= epsilon_with([], earlier, DELTA) * (1 - 2e-4)
    assert epsilon_with([*earlier, *new], [Charge(0.1, 1.0, 20)], DELTA) > price
    assert epsilon_with([*earlier, *new], [], DELTA) == pytest.approx(price, rel=1e-3)


@settings(max_examples=25)
@given(KINDS, CHARGES, st.sampled_from([0.2, 0.9, 0.97, 0.99, 0.998, 1.002, 1.01, 1.2, 3.0]))
def test_a_bound_that_is_enough_decides_as_the_exact_one(earlier: list[Charge], new: Charge, share: float) -> None:
    """Never granted above the limit; and never refused more than a thousandth below it."""
    exact = epsilon([*earlier, new], DELTA)
    limit = share * exact
    bound = epsilon_with(earlier, [new], DELTA, enough=limit)
    assert bound >= exact * (1 - 2e-4)
    assert (bound <= limit) is (share > 1)


def test_paying_by_round_at_the_edges() -> None:
    assert epsilon_with([], [], DELTA) == 0
    assert epsilon_with([], [Charge(0.1, 0.0, 0)], DELTA) == 0
    assert epsilon_with([ROUND], [Charge(0.1, 0.0, 1)], DELTA, enough=math.inf) == math.inf
    assert epsilon_with([Charge(0.1, 0.0, 1)], [ROUND], DELTA) == math.inf
    with pytest.raises(ConfigError, match="delta"):
        epsilon_with([], [ROUND], 0.0)


@pytest.mark.parametrize("delta", [1e-12, 1e-15])
def test_paying_by_round_near_float_rounding_is_priced_upwards(delta: float) -> None:
    charge = Charge(0.01, 1.415, 500)
    assert 1.8927 < epsilon_with([charge], [charge], delta) <= epsilon([charge, charge], delta, "rdp")


def test_a_run_that_pays_with_its_rest_in_view_is_priced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round moves charges from what is left to what is charged; all of them together stay the same."""
    rounds, delta = [Charge(0.03, 1.3, 7)] * 6, 3e-6
    cap = epsilon(rounds, delta)
    composed = counted(monkeypatch, "_pld_on_grid")
    prices = {epsilon_with(rounds[:done], rounds[done:], delta, enough=cap * 0.999) for done in range(6)}
    assert len(prices) == 1
    assert prices.pop() == pytest.approx(cap, rel=1e-3)
    first = len(composed)
    assert first > 0, "the bound by RDP should not do"
    epsilon_with(rounds, [*rounds[:1]], delta, enough=cap * 0.999)
    assert len(composed) > first, "more steps are another question"


def test_equal_sites_share_a_curve_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    walked = counted(monkeypatch, "_pld_curve")
    curves = [epsilon_curve([[Charge(q, 1.7, 3)]] * 4, DELTA) for q in (0.04, 0.04, 0.05)]
    assert curves[0] == curves[1] != curves[2]
    assert len(walked) == 2
    curves[0].clear()
    assert len(epsilon_curve([[Charge(0.04, 1.7, 3)]] * 4, DELTA)) == 4, "a caller's list is its own"


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[object]:
    """One entry for each call of this function of the accounting from now on."""
    calls: list[object] = []
    real = getattr(accounting, name)

    def spy(*arguments: object) -> object:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(accounting, name, spy)
    return calls
