"""The gate before any timing: every contender takes the same clipped step."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.batches import padded_batch
from benchmarks.contenders import CONTENDERS, Base, Execution, Settings
from fedlora.engine.expanded import ExpandedBackend

TOLERANCE = 1e-4  # of the sum's norm, float32; Opacus itself divides by |g| + 1e-6
RATE = 1e4  # makes the step large beside B, so that its rounding does not hide the gradient
UNBOUNDED = 1e6


def check_agreement() -> dict[str, float]:
    """Relative distance of each contender's summed gradient from fedlora's, clipped and unclipped, in float32 sdpa.

    Raises:
        AssertionError: one of them is not the same step, so a comparison of times would mean nothing.
    """
    bound = _median_norm()
    clipped = Settings(clip_norm=bound, noise_multiplier=0.0, learning_rate=RATE)
    unclipped = Settings(clip_norm=UNBOUNDED, noise_multiplier=0.0, learning_rate=RATE)
    distances = {"peft, unclipped": _distance("peft", unclipped)}
    distances |= {f"{name}, clipped": _distance(name, clipped) for name in ("opacus_hooks", "opacus_ghost")}
    assert _relative(_sum("fedlora", clipped), _sum("fedlora", unclipped)) > 100 * TOLERANCE, "nothing was clipped"
    for name, distance in distances.items():
        assert distance < TOLERANCE, f"{name}: clipped sums differ by {distance:.1e} of their norm"
    return distances


def _median_norm() -> float:
    """A bound that clips half of the records."""
    base = Base.load(Execution("float32", "sdpa"))
    batch, labels = padded_batch(16, 16)
    backend = ExpandedBackend(base.classifier, base.layout, base.factors, base.places)
    gradients = backend.gradients(base.theta[None], batch, labels, labels * 0)
    return float(torch.cat(gradients, dim=1).norm(dim=1).median())


def _distance(name: str, settings: Settings) -> float:
    return _relative(_sum(name, settings), _sum("fedlora", settings))


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _sum(name: str, settings: Settings) -> Tensor:
    """The summed gradient [P] that moved B."""
    base = Base.load(Execution("float32", "sdpa"))
    contender = CONTENDERS[name](base, settings)
    batch, labels = padded_batch(16, 16)
    contender.step(batch, labels)
    return (base.theta - contender.theta()) * len(labels) / settings.learning_rate
