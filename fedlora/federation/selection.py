"""From what a search has released to the modules that are fine-tuned: the server's side of DiffoRA.

All of it is post-processing of noised updates and scores, or made of public text and public seeds; it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters.dam import ModuleMask, Selection, cost_aware, discretise, overlap, read_mask
from fedlora.engine.gates import GatedSlots
from fedlora.federation.module_scores import (
    ModuleScores,
    SearchState,
    module_scores,
    public_texts,
    released,
)
from fedlora.federation.workbench import Workbench
from fedlora.randomness import PublicSeed

_REDRAWS = 200
_NO_SCORES = ModuleScores()


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
        public_texts(config)


def choose_modules(workbench: Workbench, search: SearchState, noise_multipliers: Sequence[float]) -> Selection:
    """The run's one choice, from what was released so far.

    Args:
        workbench: adapts all candidates.
        search: what the search's rounds have released.
        noise_multipliers: of training, by client, as far as they have told theirs.

    Raises:
        FedloraError: the rounds that the choice needs have released nothing.
    """
    adapter, candidates = workbench.config.adapter, workbench.candidates
    if adapter.select == "all":
        return _selection(workbench, ModuleMask(candidates, (True,) * len(candidates)), "none")
    if adapter.select == "mask":
        return _selection(workbench, read_mask(Path(adapter.mask).expanduser(), candidates), "none")
    scores = module_scores(workbench, search, noise_multipliers)
    if adapter.discretise != "cost_aware":
        return _selection(workbench, _top(workbench, scores.values), adapter.discretise, scores)
    ratio = released(search.products, "warm-up").noise_to_signal(workbench.config.federation.cohort_size)
    mask = _cost_aware(workbench, scores, ratio)
    if mask is not None:
        return _selection(workbench, mask, "cost_aware", scores, noise_to_signal=ratio)
    note = "no signal stood out of the noise of the warm-up, so the choice fell back on global_topk"
    fallback = _top(workbench, scores.values)
    return _selection(workbench, fallback, "global_topk", scores, noise_to_signal=ratio, note=note)


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
        theta = before.opened(theta[None], search.gates[None])[0]
    trained = {slot.name: before.layout.view(theta, slot) for slot in before.layout.slots}
    for slot in workbench.layout.slots:
        if slot.name in trained:  # an adapter that modules share starts afresh
            workbench.layout.view(start, slot).copy_(trained[slot.name])
    return start


def _top(workbench: Workbench, scores: Sequence[float]) -> ModuleMask:
    """The best by score; where the choice is to weigh costs, the best of all as a fallback."""
    adapter = workbench.config.adapter
    how = "global_topk" if adapter.discretise == "cost_aware" else adapter.discretise
    return discretise(workbench.candidates, scores, how=how, ratio=adapter.ratio)


def _cost_aware(workbench: Workbench, scores: ModuleScores, noise_to_signal: float) -> ModuleMask | None:
    """Energy against noise. What scores measure linearly is squared, without the square that noise alone has."""
    if not math.isfinite(noise_to_signal):
        return None
    energies = scores.values
    if workbench.config.adapter.select == "alignment":
        noise = scores.deviations or [0.0] * len(energies)
        energies = [math.copysign(score**2, score) - std**2 for score, std in zip(energies, noise, strict=True)]
    return cost_aware(workbench.candidates, energies, noise_to_signal=noise_to_signal)


def _selection(
    workbench: Workbench,
    mask: ModuleMask,
    how: str,
    scores: ModuleScores = _NO_SCORES,
    *,
    noise_to_signal: float | None = None,
    note: str = "",
) -> Selection:
    return Selection(
        mask=mask,
        method=workbench.config.adapter.select,
        discretise=how,
        ratio=sum(mask.chosen) / len(mask.chosen),
        scores=tuple(scores.values),
        noise_to_signal=noise_to_signal,
        stability=_stability(workbench, mask, scores, noise_to_signal),
        diagnostics=scores.diagnostics,
        note=note,
    )


def _stability(
    workbench: Workbench, mask: ModuleMask, scores: ModuleScores, noise_to_signal: float | None
) -> float | None:
    """Mean overlap of `mask` with those of scores to which noise like their own is added."""
    if scores.deviations is None:
        return None
    generator = PublicSeed.from_int(workbench.config.run.seed).numpy("dam", "stability")
    found = []
    for _ in range(_REDRAWS):
        again = (np.array(scores.values) + generator.normal(0.0, scores.deviations)).tolist()
        redrawn = None
        if noise_to_signal is not None:
            redrawn = _cost_aware(workbench, replace(scores, values=again), noise_to_signal)
        found.append(overlap(mask, redrawn or _top(workbench, again)))
    return float(np.mean(found))
