"""Pictures of what happened inside the model, where records have the facts for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedlora.experiments.report.choice_figure import draw_choices
from fedlora.experiments.report.figures import slug
from fedlora.experiments.report.guarantees import figure_note
from fedlora.experiments.report.modules import choice_maps, noise_shares
from fedlora.experiments.report.results import Results
from fedlora.experiments.report.style import FAINT, drawing, explain, label_handles, legend, look, panels, plain, save
from fedlora.experiments.report.words import epsilon_title

_NOISE = (
    "Share of noise in how far training moved a layer: squared norm expected of the noise alone over that which was "
    "seen, each summed over slots and seeds. At 1 nothing but noise is visible; noise to signal is share / (1 - share)."
)


def draw_module_figures(results: Results, folder: Path) -> list[str]:
    """Write both kinds where records have the facts; returns names without endings."""
    names = []
    maps = choice_maps(results)
    for place, task in enumerate(results.tasks):
        name = f"{place + 1}_{slug(task)}"
        own = [entry for entry in maps if entry.task == task]
        if own:
            chosen = [run for entry in own for run in results.of(task, entry.label, entry.epsilon)]
            names.append(draw_choices(own, figure_note(chosen), folder, f"modules_{name}"))
        if shares := noise_shares(results, task):
            names.append(_draw_noise(results, task, shares, folder, f"noise_by_layer_{name}"))
    return names


def _draw_noise(
    results: Results, task: str, shares: Mapping[tuple[str, float], Mapping[int, float]], folder: Path, name: str
) -> str:
    from matplotlib.ticker import MaxNLocator

    epsilons = sorted({epsilon for _, epsilon in shares})
    with drawing() as plt:
        figure, axes = panels(plt, len(epsilons), results.labels)
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
        legend(figure, label_handles(results, lines=True))
        explain(figure, _NOISE, figure_note([run for at in shares for run in results.of(task, *at)]))
        return save(figure, folder, name)
