"""From a score per module to a choice of modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from fedlora.adapters.dam.mask import Candidate, ModuleMask
from fedlora.errors import AdapterError, ConfigError
from fedlora.randomness import PublicSeed


def discretise(
    candidates: Sequence[Candidate],
    scores: Sequence[float],
    *,
    how: Literal["per_layer_topk", "global_topk"],
    ratio: float,
) -> ModuleMask:
    """The modules of highest score; ties go to the module that comes first, so equal scores give equal masks.

    `per_layer_topk` takes the ⌊ratio · N⌋ best of each layer's N candidates (DiffoRA, arXiv 2502.08905: K = ⌊ρN⌋), so a
    layer with few may get none; `global_topk` the ⌊ratio · M⌋ best of all M.

    Args:
        scores: one for each candidate; only their order counts.
        ratio: ρ, in (0, 1].

    Raises:
        ConfigError: the ratio is outside (0, 1] or so small that no module is chosen.
        AdapterError: scores that are not finite or not one for each candidate.
    """
    _check_scores(candidates, scores)
    if not 0 < ratio <= 1:
        raise ConfigError(f"adapter.ratio = {ratio}, wanted > 0 and <= 1")
    groups: dict[int, list[int]] = {}
    for index, candidate in enumerate(candidates):
        groups.setdefault(candidate.layer if how == "per_layer_topk" else 0, []).append(index)
    chosen: set[int] = set()
    for group in groups.values():
        ranking = sorted(group, key=lambda index: -scores[index])  # stable: ties stay in the model's order
        chosen.update(ranking[: _share_of(ratio, len(group))])
    if not chosen:
        largest = max(map(len, groups.values()))
        of = "any layer's" if how == "per_layer_topk" else "all"
        raise ConfigError(
            f"adapter.ratio = {ratio} chooses none of {of} {largest} modules (adapter.discretise = {how}), "
            f"wanted at least one; set adapter.ratio to at least {math.ceil(1e4 / largest) / 1e4}"
        )
    return _mask(candidates, chosen)


def cost_aware(
    candidates: Sequence[Candidate], energies: Sequence[float], *, noise_to_signal: float
) -> ModuleMask | None:
    """The set S of modules that maximises Φ_S / (1 + R · D_S): signal captured against noise added.

    Φ_S is S's share of all positive energy, D_S its share of all B parameters (the rank cancels), R the noise-to-signal
    ratio of all modules together. The model behind it: the clip is active and comes after the choice, so the signal
    keeps its norm while noise shrinks with the parameters. Nothing is chosen by a ratio.

    The best set is a prefix of the order by energy per parameter (Dinkelbach 1967: at the optimum λ a module pays for
    itself exactly if its Φ > λ · R · D). The value of prefixes rises to one peak, so the first module that would not
    raise it ends the choice; of equally good prefixes that is the smallest.

    Args:
        energies: unbiased estimates of each module's signal energy; negative ones count as 0 and are never chosen.
        noise_to_signal: R in [0, ∞]. At 0 every module of positive energy is chosen, at ∞ the best per parameter alone.

    Returns:
        The mask; None where no energy is positive, so that nothing tells the modules apart.

    Raises:
        AdapterError: energies that are not finite or not one for each candidate; R negative or NaN.
    """
    _check_scores(candidates, energies)
    if not noise_to_signal >= 0:
        raise AdapterError(f"noise-to-signal ratio {noise_to_signal}, wanted 0 or more")
    largest = max(energies)
    if largest <= 0:
        return None
    costs = [candidate.out_features for candidate in candidates]
    gains = [energy / largest for energy in energies]
    ranking = sorted(range(len(gains)), key=lambda index: -gains[index] / costs[index])
    # Numerator and denominator are divided by R where it is large, so that R = ∞ needs no case of its own.
    constant, slope = 1 / max(noise_to_signal, 1.0), min(noise_to_signal, 1.0) / sum(costs)
    chosen: set[int] = set()
    captured = parameters = 0.0
    for index in ranking:
        if chosen and gains[index] * (constant + slope * parameters) <= captured * slope * costs[index]:
            break
        chosen.add(index)
        captured += gains[index]
        parameters += costs[index]
    return _mask(candidates, chosen)


def random_scores(candidates: Sequence[Candidate], seed: PublicSeed) -> list[float]:
    """Scores that know nothing: discretised, the control with the same number of modules in each layer."""
    return [float(score) for score in seed.numpy("dam", "random").random(len(candidates))]


def _share_of(ratio: float, count: int) -> int:
    """⌊ratio · count⌋ of the number that was written: 0.29 · 100 is 29, though 28.999… in floating point."""
    return math.floor(round(ratio * count, 9))


def _mask(candidates: Sequence[Candidate], chosen: set[int]) -> ModuleMask:
    return ModuleMask(tuple(candidates), tuple(index in chosen for index in range(len(candidates))))


def _check_scores(candidates: Sequence[Candidate], scores: Sequence[float]) -> None:
    if not candidates or len(scores) != len(candidates):
        raise AdapterError(f"{len(scores)} scores for {len(candidates)} modules, wanted one for each")
    wrong = [candidate.module for candidate, score in zip(candidates, scores, strict=True) if not math.isfinite(score)]
    if wrong:
        raise AdapterError(f"{len(wrong)} scores are not finite, the first that of {wrong[0]}; modules have no order")
