"""What happened inside the model: which modules were chosen how often, how much of each layer's movement is noise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.experiments.report.figures import slug
from fedlora.experiments.report.results import ReportedRun, Results, found, number
from fedlora.experiments.report.style import FAINT, drawing, explain, legend, look, panels, plain, save
from fedlora.experiments.report.words import epsilon_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CHOSEN = "How often each module was chosen, over seeds; hatched: no such module."
_NOISE = (
    "Share of noise in how far training moved a layer: squared norm expected of the noise alone over that which was "
    "seen, each summed over slots and seeds. At 1 nothing but noise is visible; noise to signal is share / (1 - share)."
)


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


def draw_module_figures(results: Results, folder: Path) -> list[str]:
    """Write both kinds where records have the facts; returns names without endings."""
    names = []
    maps = choice_maps(results)
    for place, task in enumerate(results.tasks):
        name = f"{place + 1}_{slug(task)}"
        own = [entry for entry in maps if entry.task == task]
        if own:
            names.append(_draw_choices(own, folder, f"modules_{name}"))
        if shares := noise_shares(results, task):
            names.append(_draw_noise(results, task, shares, folder, f"noise_by_layer_{name}"))
    return names


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


def _draw_choices(maps: Sequence[ChoiceMap], folder: Path, name: str) -> str:
    with drawing() as plt:
        kinds, layers = max(len(m.kinds) for m in maps), max(len(m.layers) for m in maps)
        figure, axes = panels(plt, len(maps), width=0.8 + 0.48 * kinds, height=1.5 + 0.26 * layers)
        for panel, entry in zip(axes, maps, strict=True):
            mesh = _draw_map(plt, panel, entry)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.03, pad=0.02, ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["never", "half", "always"])
        bar.outline.set_visible(False)
        figure.suptitle(plain(maps[0].task, 60), x=0.01, ha="left", fontsize=11)
        explain(figure, _CHOSEN)
        return save(figure, folder, name)


def _draw_map(plt: Any, panel: Axes, entry: ChoiceMap) -> Any:
    share = entry.counts / entry.num_runs
    panel.set_facecolor("white")
    mesh = panel.pcolormesh(share, cmap="Blues", vmin=0, vmax=1, edgecolor="white", linewidth=1.5)
    for row, column in np.ndindex(*share.shape):
        if np.isnan(share[row, column]):
            panel.add_patch(
                plt.Rectangle((column, row), 1, 1, facecolor="none", edgecolor=FAINT, hatch="////", linewidth=0)
            )
            continue
        panel.text(
            column + 0.5,
            row + 0.5,
            f"{entry.counts[row, column]:.0f}",
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if share[row, column] > 0.55 else "#333333",
        )
    panel.set_xticks(np.arange(len(entry.kinds)) + 0.5, [kind.replace("_", "\n") for kind in entry.kinds], rotation=0)
    panel.set_yticks(np.arange(len(entry.layers)) + 0.5, entry.layers)
    panel.tick_params(length=0, labelsize=6.5)
    panel.invert_yaxis()
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    runs = "1 run" if entry.num_runs == 1 else f"{entry.num_runs} runs"
    panel.set_title(f"{plain(entry.label)}, {epsilon_title(entry.epsilon)}\n{runs}", fontsize=8)
    panel.set_ylabel("layer", fontsize=7)
    return mesh


def _draw_noise(
    results: Results, task: str, shares: Mapping[tuple[str, float], Mapping[int, float]], folder: Path, name: str
) -> str:
    from matplotlib.ticker import MaxNLocator

    epsilons = sorted({epsilon for _, epsilon in shares})
    with drawing() as plt:
        figure, axes = panels(plt, len(epsilons))
        for panel, epsilon in zip(axes, epsilons, strict=True):
            for label in results.labels:
                own = shares.get((label, epsilon), {})
                if own:
                    panel.plot(list(own), list(own.values()), **look(results, label), markersize=4, label=plain(label))
            panel.axhline(1, color=FAINT, linewidth=1)
            panel.text(
                0.995, 1, "all noise", transform=panel.get_yaxis_transform(), ha="right", va="bottom", fontsize=7
            )
            panel.set_ylim(bottom=0, top=max(1.15, *(1.05 * max(own.values(), default=1) for own in shares.values())))
            panel.set_title(f"{plain(task)}, {epsilon_title(epsilon)}")
            panel.set_xlabel("layer")
            panel.set_ylabel("noise's share of energy")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(figure, axes)
        explain(figure, _NOISE)
        return save(figure, folder, name)
