"""What a sequence of private releases costs: ε at a given δ, for one record added or removed.

The default accountant composes privacy loss distributions (PLD; Koskela et al., 2020; Doroshenko et al., "Connect
the Dots", 2022) as implemented by Google's dp-accounting. RDP (Mironov et al., 2019) is a looser upper bound.
Gaussian DP's central limit theorem is not offered: it reports less ε than a run really costs.

Why the printed ε is an upper bound:

* The discretised PLD dominates the true one *at every grid interval*: a coarser grid can only raise ε. So the grid
  may be chosen for speed, and is: halved until another halving would change ε by less than 0.01 %.
* Composition runs through FFTs, whose rounding can hide a little δ. Measured against direct convolution it hides
  less than 1.3e-16 per composed step; we give away four times that. Where this would eat a tenth of δ, RDP, which
  needs no FFT, is asked too.

No torch, and dp-accounting (0.8 s to import) only inside the functions that price something.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlora.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

ACCOUNTANTS = ("pld", "rdp")

_REFINE_UNTIL = 1e-4  # relative error in ε at which the grid is fine enough
_FINEST_INTERVAL = 1e-4 / 16  # below, the second differences that make a PLD are mostly rounding
_COARSEST_INTERVAL = 1e-4 * 2**12
_MOST_POINTS = 50_000  # of one step's PLD, or up to twice that: half a second
_ROUGH_POINTS = 8_000
_NO_NOISE = 1e-6  # a smaller multiplier buys nothing that a number can hold: its ε is reported as infinite
_MOST_NOISE = 1e8  # more is priced as this much, an upper bound; the formulas overflow far above it
_DELTA_LOST_PER_STEP = 5e-16  # four times the largest FFT error measured


@dataclass(frozen=True, slots=True)
class Charge:
    """One homogeneous block of Poisson-subsampled Gaussian releases, priced under add/remove of one record.

    Attributes:
        sampling_probability: q, chance of each record to be in a step's batch; 0 < q <= 1, where 1 samples nothing.
        noise_multiplier: the *effective* σ: smallest standard deviation of the released noise over the L2
            sensitivity of what is released; 0 is a release without protection.
        num_steps: releases in the block, >= 0.

    Raises:
        ConfigError: a value outside its range.
    """

    sampling_probability: float
    noise_multiplier: float
    num_steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_probability <= 1:
            raise ConfigError(
                f"sampling_probability = {self.sampling_probability}, wanted above 0 and at most 1; "
                "it is expected batch size / number of records"
            )
        if not (self.noise_multiplier >= 0 and math.isfinite(self.noise_multiplier)):
            raise ConfigError(f"noise_multiplier = {self.noise_multiplier}, wanted a finite number >= 0 (0: no noise)")
        if self.num_steps != int(self.num_steps) or self.num_steps < 0:
            raise ConfigError(f"num_steps = {self.num_steps}, wanted a whole number >= 0")


def event(charges: Sequence[Charge]) -> Any:
    """The releases as a `dp_accounting.DpEvent`, for anyone who wants to price them with another accountant."""
    import dp_accounting

    return dp_accounting.ComposedDpEvent([_event_of(charge) for charge in charges if charge.num_steps])


def epsilon(charges: Sequence[Charge], delta: float, accountant: str = "pld") -> float:
    """Upper bound on ε at `delta` of all `charges` together, whatever their order.

    "pld" is within about 0.01 % of the exact value where δ is far above float rounding (see the module's docstring).
    Always computed, never read from disk: this is the function that decides whether a run may happen.

    Args:
        charges: releases; equal ones are merged before pricing.
        delta: 0 < δ < 1.
        accountant: "pld" (tight) or "rdp" (looser).

    Returns:
        ε >= 0; 0 for no releases, infinity where one of them adds no noise (σ below 1e-6).

    Raises:
        ConfigError: δ or the accountant is not as above.
    """
    check_delta(delta)
    _check_accountant(accountant)
    return _epsilon_of_merged(merged(charges), delta, accountant)


def epsilon_with(earlier: Sequence[Charge], new: Sequence[Charge], delta: float, *, enough: float = -math.inf) -> float:
    """Upper bound on ε of `earlier` releases and `new` ones, for one who pays round by round.

    What it composes of `earlier` is remembered in this process, so that the next round of the same kind costs one more
    composition. So are answers, by all that they price: where `new` holds the rest of a run, each of its rounds moves
    charges to `earlier` and asks the same question again. No disk is read.

    Args:
        earlier: charged so far; the kind that changes most often should come last.
        new: to be charged now.
        delta: 0 < δ < 1.
        enough: any bound at or below it will do, and the cheapest that shows it is returned.

    Returns:
        ε >= 0 by the "pld" accountant; infinity where a release adds no noise.

    Raises:
        ConfigError: δ is out of range.
    """
    check_delta(delta)
    kinds = [(charge.sampling_probability, charge.noise_multiplier) for charge in new]
    recent = [charge for charge in earlier if (charge.sampling_probability, charge.noise_multiplier) in kinds]
    rest = [charge for charge in earlier if (charge.sampling_probability, charge.noise_multiplier) not in kinds]
    charges = (*merged(rest), *merged([*recent, *new]))
    return _enough_of_merged(charges, delta, enough)


def rough_epsilon(charges: Sequence[Charge], delta: float, accountant: str = "pld") -> float:
    """ε within a few percent in a few milliseconds, to steer a search and never to promise anything."""
    priced = merged(charges)
    if accountant != "pld" or not priced or any(map(_is_open, priced)) or not _on_one_grid(priced, delta):
        return epsilon(charges, delta, accountant)
    return _pld_on_grid(priced, delta - _delta_lost(priced), _rough_interval(priced))


def epsilon_curve(per_round: Sequence[Sequence[Charge]], delta: float, accountant: str = "pld") -> list[float]:
    """Upper bounds on the ε spent after each round; the last one is `epsilon` of everything.

    Every round is composed onto the sum so far, on the grid that suits the whole run: 30 rounds take a fifth of a
    second, 1,000 some five seconds. True ε never falls from round to round, so a later bound holds for an earlier
    round as well, and the curve is non-decreasing.

    Args:
        per_round: what each round releases, in order.
        delta: 0 < δ < 1.
        accountant: "pld" or "rdp".

    Returns:
        One ε per round; infinity from the first release without noise on.

    Raises:
        ConfigError: as `epsilon`.
    """
    opened = next((i for i, charges in enumerate(per_round) if any(map(_is_open, charges))), len(per_round))
    bounds = _curve_of_merged(tuple(merged(charges) for charges in per_round[:opened]), delta, accountant)
    return [*bounds, *[math.inf] * (len(per_round) - opened)]


def check_delta(delta: float) -> None:
    """Raise ConfigError unless 0 < δ < 1."""
    if not 0 < delta < 1:
        raise ConfigError(f"delta = {delta}, wanted above 0 and below 1; choose less than 1 / number of records")


# Charges, merged -------------------------------------------------------------------------------------------------

Merged = tuple[Charge, ...]


def merged(charges: Iterable[Charge]) -> Merged:
    """Equal blocks added up, in an order that depends on their values only; what is priced, and may be remembered."""
    steps: Counter[tuple[float, float]] = Counter()
    for charge in charges:
        noise = min(float(charge.noise_multiplier), _MOST_NOISE)
        steps[float(charge.sampling_probability), noise] += int(charge.num_steps)
    return tuple(Charge(q, sigma, count) for (q, sigma), count in sorted(steps.items()) if count)


def _is_open(charge: Charge) -> bool:
    return charge.noise_multiplier < _NO_NOISE and charge.num_steps > 0


def _event_of(charge: Charge) -> Any:
    import dp_accounting

    if charge.noise_multiplier == 0:
        return dp_accounting.NonPrivateDpEvent()
    release = dp_accounting.GaussianDpEvent(charge.noise_multiplier)
    if charge.sampling_probability < 1:
        release = dp_accounting.PoissonSampledDpEvent(charge.sampling_probability, release)
    return dp_accounting.SelfComposedDpEvent(release, int(charge.num_steps))


def _check_accountant(accountant: str) -> None:
    if accountant not in ACCOUNTANTS:
        raise ConfigError(
            f"accountant = {accountant!r}, wanted one of {', '.join(ACCOUNTANTS)}; "
            "gdp is not offered: it reports less than the run costs"
        )


@functools.lru_cache(maxsize=4096)
def _epsilon_of_merged(charges: Merged, delta: float, accountant: str) -> float:
    if not charges:
        return 0.0
    if any(_is_open(charge) for charge in charges):
        return math.inf
    return _rdp_epsilon(charges, delta) if accountant == "rdp" else _pld_epsilon(charges, delta)


@functools.lru_cache(maxsize=64)
def _curve_of_merged(covered: tuple[Merged, ...], delta: float, accountant: str) -> tuple[float, ...]:
    """Remembered: sites of equal size have equal curves."""
    total = epsilon([charge for charges in covered for charge in charges], delta, accountant)
    walk = _rdp_curve if accountant == "rdp" else _pld_curve
    bounds = [*walk(covered, delta)[:-1], total] if covered else []
    for earlier in range(len(bounds) - 2, -1, -1):
        bounds[earlier] = min(bounds[earlier], bounds[earlier + 1])
    return tuple(bounds)


@functools.lru_cache(maxsize=4096)
def _enough_of_merged(charges: Merged, delta: float, enough: float) -> float:
    if not charges:
        return 0.0
    if any(map(_is_open, charges)):
        return math.inf
    bound = _rdp_epsilon(charges, delta)
    if bound <= enough or not _within_reach(charges, delta):
        return bound
    rough = _pld_on_grid(charges, delta - _delta_lost(charges), _rough_interval(charges))
    return min(bound, rough) if rough <= enough else min(bound, _refine(charges, delta - _delta_lost(charges))[0])


# Privacy loss distributions --------------------------------------------------------------------------------------


def _pld_epsilon(charges: Merged, delta: float) -> float:
    lost = _delta_lost(charges)
    if _on_one_grid(charges, delta):
        return _refine(charges, delta - lost)[0]
    bound = _refine(charges, delta - lost)[0] if _within_reach(charges, delta) else math.inf
    return min(bound, _rdp_epsilon(charges, delta))


def _within_reach(charges: Merged, delta: float) -> bool:
    """Whether a PLD says anything: some of δ is left after rounding, and a step's grid has a bearable size."""
    return _delta_lost(charges) < delta and _finest_interval(charges) <= _COARSEST_INTERVAL


def _on_one_grid(charges: Merged, delta: float) -> bool:
    """Whether a PLD alone serves: δ well above float rounding, and enough noise for a grid of bearable size."""
    return _delta_lost(charges) <= delta / 10 and _finest_interval(charges) <= _COARSEST_INTERVAL


def _refine(charges: Merged, delta: float) -> tuple[float, float]:
    """(ε, grid interval): halve the interval until it no longer matters.

    The error of Connect-the-Dots is quadratic in the interval: a halving removes three quarters of it, so a third of
    the last change is what is left.
    """
    finest = _finest_interval(charges)
    interval = max(_first_interval(charges, _MOST_POINTS), finest)
    value = _pld_on_grid(charges, delta, interval)
    while interval > finest:
        interval /= 2
        coarser, value = value, min(value, _pld_on_grid(charges, delta, interval))
        if coarser - value <= 3 * _REFINE_UNTIL * value:  # infinity minus infinity is no number and goes on
            break
    return value, interval


def _pld_on_grid(charges: Merged, delta: float, interval: float) -> float:
    return float(_compose(charges, interval).get_epsilon_for_delta(delta))


def _compose(charges: Merged, interval: float) -> Any:
    *earlier, last = charges
    block = _block(last, interval)
    return _compose_all(tuple(earlier), interval).compose(block) if earlier else block


@functools.lru_cache(maxsize=8)
def _compose_all(charges: Merged, interval: float) -> Any:
    """As `_compose`, remembered: in a ledger only the last block grows."""
    return functools.reduce(lambda left, right: left.compose(right), (_block(charge, interval) for charge in charges))


def _block(charge: Charge, interval: float) -> Any:
    """PLD of one block. Unsampled Gaussian steps are together one Gaussian with σ/√n."""
    if charge.sampling_probability == 1:
        return _one_step(1.0, charge.noise_multiplier / math.sqrt(charge.num_steps), interval)
    step = _one_step(charge.sampling_probability, charge.noise_multiplier, interval)
    return step if charge.num_steps == 1 else step.self_compose(int(charge.num_steps))


@functools.lru_cache(maxsize=8)
def _one_step(sampling_probability: float, noise_multiplier: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sampling_probability, value_discretization_interval=interval
    )


def _pld_curve(per_round: Sequence[Merged], delta: float) -> list[float]:
    everything = merged(charge for charges in per_round for charge in charges)
    if not everything:
        return [0.0] * len(per_round)
    if not _on_one_grid(everything, delta):
        return [_epsilon_of_merged(merged(prefix), delta, "pld") for prefix in _prefixes(per_round)]
    lost = _delta_lost(everything)
    interval = _refine(everything, delta - lost)[1]
    round_cost = functools.lru_cache(maxsize=8)(lambda charges: _compose(charges, interval))
    spent, bounds = None, [0.0, 0.0]
    for charges in per_round:
        if charges:
            spent = round_cost(charges) if spent is None else spent.compose(round_cost(charges))
        guess = 2 * bounds[-1] - bounds[-2]
        bounds.append(0.0 if spent is None else _epsilon_near(spent, delta - lost, interval, guess))
    return bounds[2:]


def _epsilon_near(spent: Any, delta: float, interval: float, guess: float) -> float:
    """What `spent.get_epsilon_for_delta(delta)` says, but for rounding, in a tenth of its time where `guess` is good.

    That walks down the losses one by one; here δ is asked for at both ends of the grid cell where it should cross.
    Inside a cell δ is linear in e^ε for a record added, and for one removed. The larger of the two is convex, so that
    the chord crosses at ε or above, and at ε where the same of them is larger at both ends.
    """
    cell = math.floor(guess / interval)
    for _ in range(8):
        if cell < 0:
            break
        low, high = (float(spent.get_delta_for_epsilon(end * interval)) for end in (cell, cell + 1))
        if low > delta >= high:
            return cell * interval + math.log1p((low - delta) / (low - high) * math.expm1(interval))
        if not (low > high > 0 and math.isfinite(leap := math.log(low / delta) / math.log(low / high))):
            break
        cell += math.floor(leap)
    return float(spent.get_epsilon_for_delta(delta))


def _prefixes(per_round: Sequence[Sequence[Charge]]) -> Iterator[list[Charge]]:
    """All that was released up to and including each round."""
    so_far: list[Charge] = []
    for charges in per_round:
        so_far = [*so_far, *charges]
        yield so_far


def _delta_lost(charges: Merged) -> float:
    """δ that FFT rounding may hide, with a margin; 20 steps' worth for the compositions around the steps."""
    return _DELTA_LOST_PER_STEP * (20 + sum(c.num_steps for c in charges if c.sampling_probability < 1))


def _typical_loss(charges: Merged) -> float:
    """Root mean square over all steps of one step's privacy loss: the scale its grid has to resolve."""
    variance = sum(charge.num_steps * _loss_variance(charge) for charge in charges)
    return math.sqrt(variance / sum(charge.num_steps for charge in charges))


def _loss_variance(charge: Charge) -> float:
    """Rough variance of one step's loss: the chi-square divergence, or for little noise the sampled Gaussian's."""
    q, precision = charge.sampling_probability, charge.noise_multiplier**-2
    sampled_gaussian = q * (precision + precision**2 / 4)
    return sampled_gaussian if precision > 50 else min(q * q * math.expm1(precision), sampled_gaussian)


def _first_interval(charges: Merged, points: int) -> float:
    """Where to begin: a quarter of the typical loss, unless that takes more points than these."""
    return max(min(_power_of_two(_typical_loss(charges) / 4), _COARSEST_INTERVAL), _interval_for(charges, points))


def _rough_interval(charges: Merged) -> float:
    return _first_interval(charges, _ROUGH_POINTS)


def _finest_interval(charges: Merged) -> float:
    """Interval below which nothing is gained, or a step's PLD has too many points to be worth it."""
    return max(_FINEST_INTERVAL, _interval_for(charges, _MOST_POINTS))


def _interval_for(charges: Merged, points: int) -> float:
    """Interval that lays `points` to twice as many over one step's losses, which reach 10 standard deviations."""
    reach = max(10 / c.noise_multiplier + c.noise_multiplier**-2 / 2 for c in map(_as_released, charges))
    return _power_of_two(reach / points)


def _as_released(charge: Charge) -> Charge:
    if charge.sampling_probability < 1:
        return charge
    return Charge(1.0, charge.noise_multiplier / math.sqrt(charge.num_steps), 1)


def _power_of_two(interval: float) -> float:
    """The next 1e-4 · 2^k at or below: few distinct grids, so PLDs are found again in the cache."""
    return float(1e-4 * 2.0 ** math.floor(math.log2(max(interval, 1e-12) / 1e-4)))


# Rényi differential privacy --------------------------------------------------------------------------------------


@functools.cache
def _orders() -> tuple[float, ...]:
    """dp-accounting's orders, extended upwards: little ε over many steps is best seen at large orders."""
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    return (*rdp.DEFAULT_RDP_ORDERS, 2048.0, 4096.0, 8192.0)


@functools.lru_cache(maxsize=4096)
def _rdp_of_step(sampling_probability: float, noise_multiplier: float) -> np.ndarray[Any, Any]:
    from dp_accounting import rdp

    step = _event_of(Charge(sampling_probability, noise_multiplier, 1))
    with _quiet_absl():
        divergences: np.ndarray[Any, Any] = rdp.RdpAccountant(_orders()).compose(step).rdp
    return divergences


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Hide a warning for each order whose series does not converge: it is left out, and the rest still bound ε."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _rdp_epsilon(charges: Merged, delta: float) -> float:
    return _rdp_curve([charges], delta)[0]


def _rdp_curve(per_round: Sequence[Merged], delta: float) -> list[float]:
    from dp_accounting import rdp

    spent, bounds = 0.0 * _rdp_of_step(1.0, 1.0), []
    for charges in per_round:
        for charge in charges:
            spent = spent + charge.num_steps * _rdp_of_step(charge.sampling_probability, charge.noise_multiplier)
        bounds.append(float(rdp.compute_epsilon(_orders(), spent, delta)[0]) if spent.any() else 0.0)
    return bounds
