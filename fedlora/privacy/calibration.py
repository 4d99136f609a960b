"""The least noise that keeps a run within its ε, found once and remembered on disk.

ε falls smoothly on log-log paper, so a few secants find σ to one part in a thousand: first on rough prices, then on
`accounting.epsilon`, which has the last word. The answer cannot exceed the target under the function that will later
decide whether the run may happen.

**What the memory on disk (`fedlora.cache`) may and may not do.** An entry is a σ that somebody once computed; a wrong
one would mean too little noise. Only searches are remembered: `accounting.epsilon` never reads the disk, and whoever
spends budget prices the σ it is about to use with it. A wrong entry is refused there; it cannot make a run look
cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import metadata

from fedlora.cache import remembered
from fedlora.errors import BudgetRefused, ConfigError
from fedlora.privacy import accounting
from fedlora.privacy.accounting import Charge

SCHEMA = 2  # raise it when the search or the pricing changes what it answers

_TOLERANCE = 1e-3  # σ is at most this factor above the smallest one that fits
_LARGEST_NOISE = 1e8  # beyond, a release carries nothing and the grid sees only rounding


def calibrate_noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sampling_probability: float,
    num_steps: int,
    further: Sequence[tuple[float, int]] = (),
    fixed: Sequence[Charge] = (),
    accountant: str = "pld",
) -> float:
    """Smallest noise multiplier σ with `epsilon(fixed + [Charge(sampling_probability, σ, num_steps)])` <= ε.

    Args:
        epsilon: target for everything together; infinity asks for no privacy.
        delta: 0 < δ < 1.
        sampling_probability: q of the block to calibrate, 0 < q <= 1.
        num_steps: its releases; 0 for none.
        further: blocks that get the same σ, each a sampling probability and a number of steps.
        fixed: what else is released in the same run, at noise already decided.
        accountant: "pld" (tight) or "rdp" (looser, so more noise).

    Returns:
        Effective σ >= 0, never below what the target needs and at most 0.1 % above; 0 where no noise is needed.

    Raises:
        ConfigError: an argument out of range.
        BudgetRefused: `fixed` alone reaches ε, or no usable σ is large enough.
    """
    if not epsilon > 0:
        raise ConfigError(f"epsilon = {epsilon}, wanted above 0; inf asks for no privacy")
    accounting.check_delta(delta)
    blocks = [(sampling_probability, num_steps), *further]
    for probability, steps in blocks:
        Charge(probability, 1.0, steps)  # its checks
    if math.isinf(epsilon) or not any(steps for _, steps in blocks):
        return 0.0
    question = {
        "epsilon": float(epsilon),
        "delta": float(delta),
        "sampling_probability": float(sampling_probability),
        "num_steps": int(num_steps),
        "further": [[float(probability), int(steps)] for probability, steps in further],
        "fixed": [[c.sampling_probability, c.noise_multiplier, c.num_steps] for c in accounting.merged(fixed)],
        "accountant": accountant,
        "dp_accounting": metadata.version("dp-accounting"),
        "schema": SCHEMA,
    }

    def release(sigma: float) -> list[Charge]:
        return [*fixed, *(Charge(probability, sigma, steps) for probability, steps in blocks)]

    def search() -> float:
        _check_room(epsilon, accounting.epsilon(fixed, delta, accountant), delta)
        guess = _guess(epsilon, delta, *next(block for block in blocks if block[1]))
        guess = _smallest_noise(lambda s: accounting.rough_epsilon(release(s), delta, accountant), epsilon, guess, 0.1)
        return _smallest_noise(
            lambda s: accounting.epsilon(release(s), delta, accountant), epsilon, guess, 2 * _TOLERANCE
        )

    sigma = remembered("calibration", question, search)
    return sigma if isinstance(sigma, float) and math.isfinite(sigma) and sigma > 0 else search()


# Search ----------------------------------------------------------------------------------------------------------


def _check_room(target: float, spent: float, delta: float) -> None:
    if spent >= target:
        raise BudgetRefused(
            f"the releases already fixed cost epsilon = {spent:.4g} at delta = {delta:g}, and the target is "
            f"{target:g}: nothing is left for training; give them more noise (privacy.prototype_noise_multiplier, "
            "privacy.alignment_noise_multiplier, privacy.evaluation_noise_multiplier), drop them, or raise "
            "privacy.epsilon"
        )


def _guess(epsilon: float, delta: float, sampling_probability: float, num_steps: int) -> float:
    """A σ to start from: the central limit theorem's. It steers where the search begins and nothing else."""
    spread = math.sqrt(2 * math.log(1 / delta))
    mean = math.sqrt(spread**2 + 2 * epsilon) - spread  # μ of a Gaussian mechanism with ε ≈ μ²/2 + μ·spread
    steepness = (mean / sampling_probability / math.sqrt(num_steps)) ** 2 if mean < 1e100 else math.inf
    return 1 / math.sqrt(math.log1p(min(max(steepness, 1e-12), 1e12)))


def _smallest_noise(price: Callable[[float], float], target: float, guess: float, stride: float) -> float:
    """Upper end of a bracket [low, high] of log σ around price = target, narrowed to `_TOLERANCE`."""
    low, above, high, below = _bracket(price, target, math.log(guess), stride)
    while high - low > _TOLERANCE:
        middle = _next_question(low, above, high, below)
        excess = _log_ratio(price(math.exp(middle)), target)
        if excess <= 0:
            high, below = middle, excess
        else:
            low, above = middle, excess
    return math.exp(high)


def _bracket(
    price: Callable[[float], float], target: float, here: float, stride: float
) -> tuple[float, float, float, float]:
    """(low, excess > 0 there, high, excess <= 0 there) in log σ, by growing steps away from `here`."""
    excess = _log_ratio(price(math.exp(here)), target)
    upwards = excess > 0
    while True:
        there = here + (stride if upwards else -stride)
        if there > math.log(_LARGEST_NOISE):
            raise BudgetRefused(
                f"no noise multiplier up to {_LARGEST_NOISE:g} keeps epsilon at {target:g}: "
                "what is fixed leaves too little; raise privacy.epsilon or take fewer steps"
            )
        beyond = _log_ratio(price(math.exp(there)), target)
        if (beyond > 0) != upwards:
            return (here, excess, there, beyond) if upwards else (there, beyond, here, excess)
        here, excess, stride = there, beyond, 3 * stride


def _next_question(low: float, above: float, high: float, below: float) -> float:
    """Where the secant meets the target, moved a third of the tolerance away from the nearer end.

    The move carries the question to the other side of the root, so that the far end is replaced as well; a plain
    secant would creep up on the root from one side for ever. Without a slope, or one that is spent: the middle.
    """
    if not (math.isfinite(above) and math.isfinite(below)) or above - below <= 0:
        return (low + high) / 2
    root = low + (high - low) * above / (above - below)
    root += _TOLERANCE / 3 if root - low < high - root else -_TOLERANCE / 3
    margin = min(_TOLERANCE / 3, (high - low) / 4)
    return min(max(root, low + margin), high - margin)


def _log_ratio(price: float, target: float) -> float:
    """log(price / target): positive where σ is too small."""
    if price <= 0 or math.isinf(price):
        return -math.inf if price <= 0 else math.inf
    ratio = math.log(price) - math.log(target)
    return max(ratio, 5e-324) if price > target else min(ratio, 0.0)  # the logs may round to equal, the prices decide
