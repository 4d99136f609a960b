"""Whether noise that a run released was as wide as charged, and fresh every time: tests, not bounds on ε. No torch.

For noise N(0, s²) on a subspace of dimension d, independent from release to release, |z|² / s² is χ² of d degrees. The
correlation r of two releases is then the cosine between two uniform directions, for which (r + 1) / 2 is
Beta((d − 1) / 2, (d − 1) / 2). Both laws are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby

import numpy as np


@dataclass(frozen=True, kw_only=True)
class ReleasedNoise:
    """What one site sent in one round in which it had no records.

    Attributes:
        phase: of the run.
        client: who sent it.
        round_index: when.
        values: [P] in units of the standard deviation that was charged.
        rank: d, the dimension of the subspace that the release lies in; P without a projection.
        widening: at least 1; how much wider than charged the mechanism says to make it.
    """

    phase: str
    client: int
    round_index: int
    values: np.ndarray
    rank: int
    widening: float


@dataclass(frozen=True, kw_only=True)
class NoiseFinding:
    """The least likely of all tests of an audit's released noise.

    Attributes:
        level: as of an `Evidence`.
        name: for the table.
        confidence: a sound run fails with probability 1 − `confidence` at most.
        num_tests: how many there were.
        p_value: chance of any result so unlikely, at most, if the noise were as claimed (Bonferroni over all tests).
        what: which test that was, with its figure.
        spread: measured over charged standard deviation, in the phase where it is least likely.
        correlation: of the pair whose correlation is least likely.
    """

    level: str
    name: str
    confidence: float
    num_tests: int
    p_value: float
    what: str
    spread: float
    correlation: float

    @property
    def contradicts(self) -> bool:
        """Whether it is refuted that noise is fresh and as wide as charged."""
        return self.p_value < 1 - self.confidence

    @property
    def verdict(self) -> str:
        return "contradicted" if self.contradicts else "consistent"


@dataclass(frozen=True)
class _Test:
    p_value: float
    figure: float
    what: str


def judge_noise(releases: Sequence[ReleasedNoise], *, level: str, name: str, error: float) -> NoiseFinding:
    """Test every release's spread, each phase's, and the correlation of every two releases.

    Args:
        releases: two or more, those of a phase next to one another.
        level: for the table.
        name: for the table.
        error: chance that sound noise is refuted, at most.
    """
    phases = [list(group) for _, group in groupby(releases, key=lambda release: release.phase)]
    whole = [_spread(group) for group in phases]
    spreads = [*whole, *(_spread([release]) for release in releases)]
    pairs = [_correlation(one, other) for one, other in combinations(releases, 2) if _comparable(one, other)]
    tests = [*spreads, *pairs]
    least = min(tests, key=lambda test: test.p_value)
    return NoiseFinding(
        level=level,
        name=name,
        confidence=1 - error,
        num_tests=len(tests),
        p_value=min(1.0, len(tests) * least.p_value),
        what=least.what,
        spread=min(whole, key=lambda test: test.p_value).figure,
        correlation=min(pairs, key=lambda test: test.p_value).figure,
    )


def _spread(releases: Sequence[ReleasedNoise]) -> _Test:
    """Too little is a broken promise; too much is what a stream gives that starts again in every step."""
    from scipy.stats import chi2

    energy = sum(float(release.values @ release.values) for release in releases)
    rank, widening = sum(release.rank for release in releases), max(release.widening for release in releases)
    spread = float(np.sqrt(energy / rank))
    where = f"of {_named(releases[0])}" if len(releases) == 1 else f"in phase {releases[0].phase}"
    p_value = 2 * min(chi2.cdf(energy, rank), chi2.sf(energy / widening**2, rank))
    return _Test(min(1.0, float(p_value)), spread, f"standard deviation {where} is {spread:.3f} of what was charged")


def _correlation(one: ReleasedNoise, other: ReleasedNoise) -> _Test:
    from scipy.stats import beta

    size = min(len(one.values), len(other.values))
    first, second = one.values[:size], other.values[:size]
    lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
    figure = float(np.clip(first @ second / lengths, -1, 1)) if lengths else 1.0  # nothing repeats nothing
    shape = (min(one.rank, other.rank) - 1) / 2
    p_value = 2 * float(beta.sf((abs(figure) + 1) / 2, shape, shape))
    return _Test(p_value, figure, f"correlation of {_named(one)} and {_named(other)} is {figure:.3f}")


def _comparable(one: ReleasedNoise, other: ReleasedNoise) -> bool:
    """Releases of one phase, or the beginning of the longer one where neither was projected."""
    whole = one.rank == len(one.values) and other.rank == len(other.values)
    return min(one.rank, other.rank) > 1 and (whole or one.phase == other.phase)


def _named(release: ReleasedNoise) -> str:
    return f"client {release.client}, round {release.round_index} ({release.phase})"
