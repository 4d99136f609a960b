"""What looking for settings took, by the records' key "tuning": how many were tried, on which data, at what privacy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.experiments.report.results import ReportedRun, Results, found, number
from fedlora.experiments.report.words import epsilon_text
from fedlora.experiments.terminal import one_line

UNKNOWN = "not in the record"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One search for settings, and the runs that use what it found. All in words.

    Attributes:
        covered: what ε says of the trials: what it is with all of them, that it leaves them out, or that they are free.
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
        tried=one_line(tried),
        chosen_on=one_line(facts.get("chosen_on", UNKNOWN)),
        trained_on=one_line(facts.get("trained_on", UNKNOWN)),
        values=one_line(UNKNOWN if shown is None else shown, 400),
        covered=_covered(facts),
        note=one_line(facts.get("note") or "", 600),
    )


def trials_note(runs: Sequence[ReportedRun]) -> str:
    """What a table of `runs` leaves unsaid where their settings were chosen by trials; empty where none were."""
    tuned = [facts for run in runs if isinstance(facts := found(run.record, "tuning"), Mapping) and facts]
    if not tuned:
        return ""
    bounds = [_bound(facts) for facts in tuned]
    finite = {bound for bound in bounds if bound is not None and math.isfinite(bound)}
    rest = [_covered(facts) for facts, bound in zip(tuned, bounds, strict=True) if bound not in finite]
    most = "up to " if len(finite) > 1 else ""
    told = [f"{most}ε = {epsilon_text(max(finite))}{_at_delta(tuned)} with them"] if finite else []
    cost = "; ".join(dict.fromkeys([*told, *rest]))
    return f"Settings of {len(tuned)} of {len(runs)} runs were chosen by trials: {cost}."


def _covered(facts: Mapping[str, Any]) -> str:
    if free := _free(facts):
        return free
    epsilon = _bound(facts)
    if epsilon is None:
        return "ε of the runs does not include the trials"
    if math.isinf(epsilon):
        return "no privacy with the trials counted (ε = ∞)"
    return f"ε = {epsilon_text(epsilon)} with all trials counted"


def _bound(facts: Mapping[str, Any]) -> float | None:
    """ε of a run and its trials; None where it is not known, or where the trials were not counted."""
    return None if _free(facts) else number(facts.get("epsilon_with_trials"))


def _free(facts: Mapping[str, Any]) -> str:
    """Why trials are not counted; empty where they are."""
    if "costs_nothing" in facts:
        return f"trials cost nothing, {one_line(facts['costs_nothing'])}" if facts["costs_nothing"] else ""
    by_word = "public" in str(facts.get("trained_on"))  # an old record, which tells it in words only
    return "trials cost nothing, on the author's word" if by_word else ""


def _at_delta(tuned: Sequence[Mapping[str, Any]]) -> str:
    deltas = sorted({delta for facts in tuned if (delta := number(facts.get("delta"))) is not None})
    return f" at δ = {' or '.join(f'{delta:g}' for delta in deltas)}" if deltas else ""
