"""How much each module matters, by what a search has released; made of nothing else but public text and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from fedlora.adapters.dam import Selection, UpdateProducts, random_scores
from fedlora.config import RunConfig
from fedlora.data.encode import encode
from fedlora.data.glue import Records
from fedlora.data.public_texts import public_records
from fedlora.engine.probe import probe_scores
from fedlora.errors import FedloraError
from fedlora.federation.workbench import Workbench
from fedlora.randomness import PublicSeed

T = TypeVar("T")


@dataclass(kw_only=True)
class SearchState:
    """What a run knows of its search so far; all of it released."""

    products: UpdateProducts | None = None
    """Of the updates of warm-up rounds."""
    scores: Tensor | None = None
    """[M] float64: sum of the sites' noised alignment scores."""
    scored: int = 0
    """How many sites' scores are in the sum."""
    gates: Tensor | None = None
    """[M] float32: the gates' logits after the latest bilevel round."""
    selection: Selection | None = None
    """Once the modules are chosen."""


@dataclass(frozen=True, kw_only=True)
class ModuleScores:
    """One number per candidate, and how sure it is."""

    values: Sequence[float] = ()
    deviations: Sequence[float] | None = None
    """Standard deviation of the noise in each; None where there is none, or it is not known."""
    diagnostics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def module_scores(workbench: Workbench, search: SearchState, noise_multipliers: Sequence[float]) -> ModuleScores:
    """Scores by the method of the run; arguments and errors as in `selection.choose_modules`."""
    config, count = workbench.config, len(workbench.candidates)
    match config.adapter.select:
        case "random":
            return ModuleScores(values=random_scores(workbench.candidates, PublicSeed.from_int(config.run.seed)))
        case "probe":
            return _probe(workbench)
        case "warmup":
            products = released(search.products, "warm-up")
            return ModuleScores(values=products.signal().tolist(), deviations=products.deviation().tolist())
        case "alignment":
            values = released(search.scores, "alignment").tolist()
            multiplier = config.privacy.alignment_noise_multiplier if math.isfinite(config.privacy.epsilon) else 0.0
            return ModuleScores(values=values, deviations=[multiplier * math.sqrt(search.scored)] * count)
    values = released(search.gates, "search").double().tolist()
    return ModuleScores(values=values, deviations=_gate_deviations(config, noise_multipliers, count))


def _gate_deviations(config: RunConfig, noise_multipliers: Sequence[float], count: int) -> list[float] | None:
    """Of the gates' logits: the mean over clients of as many noised steps as the search takes."""
    if len(noise_multipliers) < config.federation.clients:
        return None
    step = config.adapter.gate_learning_rate / config.training.expected_batch_size
    variance = sum(multiplier**2 for multiplier in noise_multipliers) / len(noise_multipliers)
    steps = config.search_rounds * config.federation.local_steps
    return [step * math.sqrt(variance * steps / config.federation.cohort_size)] * count


def _probe(workbench: Workbench) -> ModuleScores:
    """Traces of the modules' tangent kernels on public text; the rest of their spectra for whoever looks."""
    config = workbench.config
    found = probe_scores(
        workbench.backend,
        encode(public_texts(config), workbench.classifier.tokenizer, config.data.max_length),
        workbench.initial_theta,
        layout=workbench.layout,
        modules=[candidate.module for candidate in workbench.candidates],
        num_labels=workbench.classifier.num_labels,
        token_budget=workbench.execution.token_budget,
    )
    spectra = {"lambda_min": found.lambda_min, "effective_rank": found.effective_rank}
    return ModuleScores(
        values=found.trace.tolist(), diagnostics={name: tuple(values.tolist()) for name, values in spectra.items()}
    )


def released(found: T | None, phase: str) -> T:
    """`found`, of the phase.

    Raises:
        FedloraError: there is none.
    """
    if found is None:
        raise FedloraError(f"no round of the {phase} phase has released anything, so that no modules can be chosen")
    return found


def public_texts(config: RunConfig) -> Records:
    """What the probe looks at."""
    return public_records(config.data.task, config.adapter.probe_texts, PublicSeed.from_int(config.run.seed))
