"""From what a search has released to the modules that are fine-tuned: the server's side of DiffoRA.

All of it is post-processing of noised updates and scores, or made of public text and public seeds; it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fedlora.adapters.dam import ModuleMask, Selection, UpdateProducts, cost_aware, discretise, random_scores, read_mask
from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset, encode
from fedlora.data.public_texts import public_records
from fedlora.engine.gates import GatedSlots
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
    gates: Tensor | None = None
    """[M] float32: the gates' logits after the latest bilevel round."""
    selection: Selection | None = None
    """Once the modules are chosen."""


def check_selection(workbench: Workbench) -> None:
    """Refuse a choice that cannot be made, before anyone is asked for anything.

    Raises:
        ConfigError: the given mask does not fit the model, no module would be chosen, public texts cannot be read.
    """
    config, candidates = workbench.config, workbench.candidates
    adapter = config.adapter
    if adapter.select == "mask":
        read_mask(Path(adapter.mask).expanduser(), candidates)
    elif adapter.select not in ("none", "all"):
        _top(workbench, [0.0] * len(candidates))
    if adapter.select == "probe":
        _public_texts(workbench)


def choose_modules(workbench: Workbench, theta: Tensor, search: SearchState) -> Selection:
    """The run's one choice, from what was released so far.

    Args:
        workbench: adapts all candidates.
        theta: [P] float32, their global state.
        search: what the search's rounds have released.

    Raises:
        FedloraError: the rounds that the choice needs have released nothing.
    """
    adapter, candidates = workbench.config.adapter, workbench.candidates
    scores: Sequence[float] = ()
    diagnostics: dict[str, tuple[float, ...]] = {}
    match adapter.select:
        case "all":
            return _selection(workbench, ModuleMask(candidates, (True,) * len(candidates)))
        case "mask":
            return _selection(workbench, read_mask(Path(adapter.mask).expanduser(), candidates))
        case "random":
            scores = random_scores(candidates, PublicSeed.from_int(workbench.config.run.seed))
        case "probe":
            scores, diagnostics = _probe(workbench)
        case "warmup":
            scores = _released(search.products, "warm-up").signal().tolist()
        case "alignment":
            scores = _released(search.scores, "alignment").tolist()
        case "bilevel":
            scores = _released(search.gates, "search").double().tolist()
    if adapter.discretise == "cost_aware":
        return _cost_aware(workbench, scores, _released(search.products, "warm-up"))
    return _selection(workbench, _top(workbench, scores), scores=scores, diagnostics=diagnostics)


def chosen_theta(workbench: Workbench, theta: Tensor, search: SearchState, before: GatedSlots) -> Tensor:
    """Start of fine-tuning, [P] of the chosen modules: what the search has trained of them, or their initial values.

    Args:
        workbench: adapts the chosen modules by now.
        theta: [P'] of all candidates.
        search: its gates multiply the B that they were trained with.
        before: the slots of `theta`.
    """
    start = workbench.initial_theta.to("cpu", torch.float32).clone()
    if not workbench.config.adapter.warm_start:
        return start
    if search.gates is not None:
        theta = before.scaled(theta[None], 2 * torch.sigmoid(search.gates)[None])[0]
    trained = {slot.name: before.layout.view(theta, slot) for slot in before.layout.slots}
    for slot in workbench.layout.slots:
        if slot.name in trained:  # an adapter that modules share starts afresh
            workbench.layout.view(start, slot).copy_(trained[slot.name])
    return start


def _released(found: T | None, phase: str) -> T:
    if found is None:
        raise FedloraError(f"no round of the {phase} phase has released anything, so that no modules can be chosen")
    return found


def _top(workbench: Workbench, scores: Sequence[float]) -> ModuleMask:
    """The best by score; where the choice is to weigh costs, the best of all as a fallback."""
    adapter = workbench.config.adapter
    how = "global_topk" if adapter.discretise == "cost_aware" else adapter.discretise
    return discretise(workbench.candidates, scores, how=how, ratio=adapter.ratio)


def _cost_aware(workbench: Workbench, scores: Sequence[float], products: UpdateProducts) -> Selection:
    """Energy against noise. What scores measure linearly is squared, without the square that noise alone has."""
    config = workbench.config
    energies = scores
    if config.adapter.select == "alignment":
        noise = _alignment_variance(config)
        energies = [math.copysign(score**2, score) - noise for score in scores]
    ratio = products.noise_to_signal(_answers_per_round(config))
    mask = cost_aware(workbench.candidates, energies, noise_to_signal=ratio) if math.isfinite(ratio) else None
    note = ""
    if mask is None:
        mask = _top(workbench, scores)
        note = "no signal stood out of the noise of the warm-up, so the choice fell back on global_topk"
    return _selection(workbench, mask, scores=scores, noise_to_signal=ratio, note=note)


def _answers_per_round(config: RunConfig) -> int:
    """How many updates a round averages, if everybody answers."""
    return max(1, round(config.federation.participation * config.federation.clients))


def _alignment_variance(config: RunConfig) -> float:
    """Of the noise in the sum of all sites' scores, whose sensitivity is 1."""
    if not math.isfinite(config.privacy.epsilon):
        return 0.0
    return config.federation.clients * config.privacy.alignment_noise_multiplier**2


def _selection(
    workbench: Workbench,
    mask: ModuleMask,
    *,
    scores: Sequence[float] = (),
    noise_to_signal: float | None = None,
    note: str = "",
    diagnostics: dict[str, tuple[float, ...]] | None = None,
) -> Selection:
    adapter = workbench.config.adapter
    return Selection(
        mask=mask,
        method=adapter.select,
        discretise="none" if not scores else "global_topk" if note else adapter.discretise,
        ratio=sum(mask.chosen) / len(mask.chosen),
        scores=tuple(scores),
        noise_to_signal=noise_to_signal,
        diagnostics=diagnostics or {},
        note=note,
    )


def _probe(workbench: Workbench) -> tuple[list[float], dict[str, tuple[float, ...]]]:
    """Traces of the modules' tangent kernels on public text; the rest of their spectra for whoever looks."""
    found = probe_scores(
        workbench.backend,
        _public_texts(workbench),
        workbench.initial_theta,
        layout=workbench.layout,
        modules=[candidate.module for candidate in workbench.candidates],
        num_labels=workbench.classifier.num_labels,
        token_budget=workbench.execution.token_budget,
    )
    spectra = {"lambda_min": found.lambda_min, "effective_rank": found.effective_rank}
    return found.trace.tolist(), {name: tuple(values.tolist()) for name, values in spectra.items()}


def _public_texts(workbench: Workbench) -> EncodedDataset:
    config = workbench.config
    records = public_records(config.data.task, config.adapter.probe_texts, PublicSeed.from_int(config.run.seed))
    return encode(records, workbench.classifier.tokenizer, config.data.max_length)
