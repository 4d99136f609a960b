"""What ε promises, and where it promises nothing: for a whole report, one cell of a table, and below a figure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from fedlora.experiments.report.results import ReportedRun, Results
from fedlora.experiments.report.words import counted, epsilon_text
from fedlora.privacy.units import Guarantee, rounded_up

_ELSEWHERE = "not covered: see tables.md"


def guarantee_words(results: Results) -> list[str]:
    """What every ε of the report is about: unit, relation, δ, accountant, and what it leaves open."""
    held, others = _divided(results.runs)
    if not held:
        why = f" {_reasons(others)}. Any ε here counts what was asked for, and bounds nothing." if others else ""
        return [f"No run here has a guarantee: nothing is promised about any record.{why}"]
    whose = f" of the {counted(len(held), 'run')} with a guarantee" if others else ""
    unit, place = _bounds([guarantee for _, guarantee in held])
    from_whom = _listed(guarantee.from_whom for _, guarantee in held)
    return [
        f"Every ε{whose} is an upper bound for {unit}, {from_whom}, {place}.",
        *([f"Nothing is promised by {counted(len(others), 'other run')}: {_reasons(others)}."] if others else []),
        *(f"Not covered: {text}." for text in dict.fromkeys(guarantee.not_covered for _, guarantee in held)),
    ]


def guarantee_cell(runs: Sequence[ReportedRun]) -> str:
    """For a row of a CSV file that is made of `runs`: what their ε is about, or why it promises nothing."""
    texts = Counter(map(_of_run, runs))
    if len(texts) == 1:
        return next(iter(texts))
    return " | ".join(f"{count} of {len(runs)} runs: {text}" for text, count in texts.items())


def figure_note(runs: Sequence[ReportedRun]) -> str:
    """For the foot of a figure that shows ε of `runs`."""
    held, others = _divided(runs)
    notes = []
    if held:
        unit, place = _bounds([guarantee for _, guarantee in held])
        notes.append(f"ε: upper bound for {unit} {place}; {_ELSEWHERE}.")
    if others:
        which = f"{counted(len(others), 'other run')} (costs.csv says which)" if held else "any ε here"
        notes.append(f"Nothing is promised by {which}: {_reasons(others)}.")
    return " ".join(notes)


def odds(results: Results) -> list[tuple[str, str, str]]:
    """For each ε that is promised: it, how many times likelier (e^ε), and how often at most a guess can be right.

    An ε is the one that was asked for, or what a site was charged where that is more.

    Whoever has to tell from all that leaves a site whether a record took part, both as likely beforehand, is right with
    probability at most (e^ε + δ) / (1 + e^ε). Source: Kairouz, Oh and Viswanath, The Composition Theorem for
    Differential Privacy (ICML 2015), section 2, from the hypothesis-testing region of (ε, δ).
    """
    deltas: dict[float, float] = {}
    for run, guarantee in _divided(results.runs)[0]:
        epsilon = rounded_up(max(run.epsilon, run.spent or 0.0))
        deltas[epsilon] = max(guarantee.delta, deltas.get(epsilon, 0.0))
    rows = []
    for epsilon, delta in sorted(deltas.items()):
        times = math.exp(min(epsilon, 700.0))  # what float64 can hold
        right = 1 - (1 - delta) / (1 + times)
        factor = f"{_up(times, 1):,.1f}" if times < 1e6 else f"{times:.1e}"
        rows.append((epsilon_text(epsilon), factor, _percent(right)))
    return rows


def _divided(runs: Iterable[ReportedRun]) -> tuple[list[tuple[ReportedRun, Guarantee]], list[ReportedRun]]:
    """Of the runs that asked for a finite ε: those that have a guarantee with it, and those that have none."""
    asked = [run for run in runs if math.isfinite(run.epsilon)]
    held = [(run, run.guarantee) for run in asked if run.guarantee and run.promised]
    return held, [run for run in asked if not run.promised]


def _bounds(held: Sequence[Guarantee]) -> tuple[str, str]:
    """What is bounded, and at which δ by whom; several of them where runs differ."""
    units, relations = _listed(g.whose for g in held), _listed(g.relation for g in held)
    deltas = _listed(f"{g.delta:g}" for g in sorted(held, key=lambda g: g.delta))
    accountants = _listed(g.accountant.upper() for g in held)
    return f"{units} ({relations})", f"at δ = {deltas}, by {accountants} accounting"


def _reasons(runs: Iterable[ReportedRun]) -> str:
    """Why runs promise nothing, each reason with its number of runs."""
    reasons = Counter(_why(run) for run in runs)
    return "; ".join(f"{reason} ({counted(count, 'run')})" for reason, count in reasons.items())


def _why(run: ReportedRun) -> str:
    return "; ".join(run.guarantee.flaws) if run.guarantee else "the record states no guarantee"


def _of_run(run: ReportedRun) -> str:
    held = run.guarantee
    if held is None or held.flaws:
        return f"no guarantee: {_why(run)}"
    whom = "" if held.noise_by == "site" else f", {held.from_whom}"
    return (
        f"ε upper bound, {held.whose}, {held.relation}, δ = {held.delta:g}, {held.accountant.upper()}{whom}; "
        f"{_ELSEWHERE}"
    )


def _percent(share: float) -> str:
    return f"{_up(100 * share, 1):.1f} %" if share < 0.999 else f"{min(_up(100 * share, 3), 100):.3f} %"


def _up(value: float, digits: int) -> float:
    return math.ceil(value * 10.0**digits - 1e-9) / 10.0**digits


def _listed(texts: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(texts))
