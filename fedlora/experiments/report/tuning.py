"""What looking for settings took, by the records' key "tuning": how many were tried, on which data, at what privacy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.experiments.report.results import Results, clean, found, number
from fedlora.experiments.report.words import epsilon_text

UNKNOWN = "not in the record"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One search for settings, and the runs that use what it found. All in words.

    Attributes:
        covered: what ε says of the trials: "covered, ε = … with all trials", or that it does not include them.
    """

    task: str
    label: str
    epsilons: str
    tried: str
    chosen_on: str
    trained_on: str
    values: str
    covered: str
    note: str


def tunings_of(results: Results) -> list[Tuned]:
    """Every search that a record tells of, once for the runs that share it."""
    shared: dict[tuple[str, str, str], list[float]] = {}
    for run in results.runs:
        facts = found(run.record, "tuning")
        if isinstance(facts, Mapping) and facts:
            epsilons = shared.setdefault((run.task, run.label, json.dumps(facts, sort_keys=True)), [])
            epsilons += [] if run.epsilon in epsilons else [run.epsilon]
    order = {name: place for place, name in enumerate((*results.tasks, *results.labels))}
    places = sorted(shared, key=lambda place: (order[place[0]], order[place[1]], min(shared[place]), place[2]))
    return [_tuned(task, label, sorted(shared[task, label, facts]), json.loads(facts)) for task, label, facts in places]


def _tuned(task: str, label: str, epsilons: Iterable[float], facts: Mapping[str, Any]) -> Tuned:
    runs, values = facts.get("runs"), facts.get("values")
    tried = f"{facts.get('configurations', UNKNOWN)}" + (f" in {runs} runs" if runs is not None else "")
    shown = ", ".join(f"{name} = {value}" for name, value in values.items()) if isinstance(values, Mapping) else values
    return Tuned(
        task=task,
        label=label,
        epsilons=", ".join(map(epsilon_text, epsilons)),
        tried=clean(tried),
        chosen_on=clean(facts.get("chosen_on", UNKNOWN)),
        trained_on=clean(facts.get("trained_on", UNKNOWN)),
        values=clean(UNKNOWN if shown is None else shown, 400),
        covered=_covered(number(facts.get("epsilon_with_trials"))),
        note=clean(facts.get("note") or "", 600),
    )


def _covered(epsilon: float | None) -> str:
    if epsilon is None:
        return "ε of the runs does not include the trials"
    if math.isinf(epsilon):
        return "no privacy with the trials counted (ε = ∞)"
    return f"ε = {epsilon_text(epsilon)} with all trials counted"
