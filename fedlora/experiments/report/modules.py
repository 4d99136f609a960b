"""What happened inside the model: which modules were chosen how often, how much of each layer's movement is noise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.experiments.report.results import ReportedRun, Results, found, number
from fedlora.experiments.report.style import plain


@dataclass(frozen=True, kw_only=True)
class ChoiceMap:
    """How often each module was chosen by the runs of one label and ε.

    Attributes:
        counts: [layers, kinds], NaN where there is no such module.
    """

    task: str
    label: str
    epsilon: float
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    counts: np.ndarray
    num_runs: int


def choice_maps(results: Results) -> list[ChoiceMap]:
    """By task, label and ε, where modules were chosen; who takes all of them in every run has not chosen."""
    maps = []
    for task in results.tasks:
        for label in results.labels:
            of_label = [_map(results.of(task, label, epsilon)) for epsilon in results.epsilons]
            there = [entry for entry in of_label if entry is not None]
            if any(np.nanmin(entry.counts) < entry.num_runs for entry in there):
                maps += there
    return maps


def noise_shares(results: Results, task: str) -> dict[tuple[str, float], dict[int, float]]:
    """By label and ε: the share of noise in the energy of each layer's movement; of private runs that tell it."""
    shares = {}
    for label in results.labels:
        for epsilon in results.epsilons:
            seen, noise = Counter[int](), Counter[int]()
            for slot in (slot for run in results.of(task, label, epsilon) for slot in _slots(run)):
                layer, energy = number(found(slot, "layer")), number(found(slot, "energy"))
                expected = number(found(slot, "noise_energy"))
                if layer is not None and energy is not None and expected is not None:
                    seen[int(layer)] += energy  # type: ignore[assignment]
                    noise[int(layer)] += expected  # type: ignore[assignment]
            if math.isfinite(epsilon) and any(noise.values()):
                shares[label, epsilon] = {layer: noise[layer] / seen[layer] for layer in sorted(seen) if seen[layer]}
    return shares


def _map(runs: Sequence[ReportedRun]) -> ChoiceMap | None:
    chosen, total = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    counted = 0
    for run in runs:
        candidates = found(run.record, "selection", "candidates")
        places = _places(candidates) if isinstance(candidates, list) else []
        counted += bool(places)
        for place, selected in places:
            total[place] += 1
            chosen[place] += selected
    if not counted:
        return None
    layers = sorted({layer for layer, _ in total}, key=lambda layer: -1 if layer == "outside" else int(layer))
    kinds = list(dict.fromkeys(kind for _, kind in total))
    counts = np.array([[chosen[a, b] if (a, b) in total else np.nan for b in kinds] for a in layers])
    first = runs[0]
    return ChoiceMap(
        task=first.task,
        label=first.label,
        epsilon=first.epsilon,
        layers=tuple(layers),
        kinds=tuple(kinds),
        counts=counts,
        num_runs=counted,
    )


def _places(candidates: Sequence[Any]) -> list[tuple[tuple[str, str], bool]]:
    """Layer and type of each candidate, and whether it was chosen.

    A model of two stacks has a layer and type twice: the second of them gets a column of its own.
    """
    seen: Counter[tuple[int, str]] = Counter()
    places = []
    for candidate in candidates:
        layer, kind = number(found(candidate, "layer")), found(candidate, "type")
        if layer is None or kind is None or not isinstance(candidate, Mapping):
            continue
        seen[int(layer), str(kind)] += 1
        again = seen[int(layer), str(kind)]
        name = plain(str(kind) if again == 1 else f"{kind} ({again})", 24)
        places.append((("outside" if layer < 0 else str(int(layer)), name), candidate.get("selected") is True))
    return places


def _slots(run: ReportedRun) -> list[Any]:
    slots = run.record.get("slots")
    return slots if isinstance(slots, list) else []
