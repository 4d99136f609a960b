"""What a reader has to know about the runs of one table, beside their numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from fedlora.experiments.report.results import ReportedRun, found
from fedlora.experiments.report.tuning import trials_note
from fedlora.experiments.report.words import counted, epsilon_text
from fedlora.experiments.terminal import one_line
from fedlora.privacy.units import Guarantee


def notes_of(runs: Sequence[ReportedRun]) -> list[str]:
    """What makes runs of one table less comparable, or less private, than they look."""
    return [*_comparability(runs), *_privacy(runs)]


_OF = {
    "own": "the metric is the mean over the sites' own models, which no one adapter has.",
    "shared": "the metric is of the part alone that the sites share.",
}
"""Said of `metric.of`."""


def _comparability(runs: Sequence[ReportedRun]) -> Iterator[str]:
    codes, parts = Counter(run.code for run in runs), Counter(run.validation_part for run in runs)
    if len(codes) > 1:
        shown = ", ".join(f"{code[:12]} ({count} runs)" for code, count in sorted(codes.items()))
        yield f"Runs of {len(codes)} different versions of the code: {one_line(shown)}. A difference may be the code's."
    if len(parts) > 1:
        shown = ", ".join(f"{part} ({count} runs)" for part, count in sorted(parts.items()))
        yield f"Metrics on different parts of the validation data: {one_line(shown)}. They do not compare."
    elif "all" not in parts:
        yield f"Metric on one half of the validation data: data.validation_part = {one_line(next(iter(parts)))}."
    names = sorted({run.metric for run in runs})
    if len(names) > 1:
        yield f"Different metrics in one table: {', '.join(names)}. They do not compare."
    for of, said in _OF.items():
        if count := sum(found(run.record, "metric", "of") == of for run in runs):
            yield f"{count} of {len(runs)} runs: {said}"
    if unused := sum(run.unused for run in runs):
        short = sum(run.unused > 0 for run in runs)
        yield (
            f"{short} of {len(runs)} runs did without {counted(unused, 'answer')} of clients, paid for all the same; "
            "rounds.jsonl of each says why."
        )
    places = Counter((run.label, run.epsilon, run.seed) for run in runs)
    if twice := sum(count > 1 for count in places.values()):
        yield f"{twice} places of the table have several runs of one seed, which differ in something that is no axis."


def _privacy(runs: Sequence[ReportedRun]) -> Iterator[str]:
    seeded = sum(run.guarantee is not None and run.guarantee.noise_seeded for run in runs if math.isfinite(run.epsilon))
    unsound = sum(run.guarantee is not None and run.guarantee.unsound for run in runs)
    unsaid = sum(run.guarantee is None for run in runs)
    if seeded:
        yield (
            f"{seeded} of {len(runs)} runs: noise seeded, not private. Anyone can repeat their noise; ε is what secret "
            "noise would have given."
        )
    if unsound:
        yield f"{unsound} of {len(runs)} runs: no guarantee, the mechanism releases something without noise."
    if unsaid:
        yield f"{unsaid} of {len(runs)} runs: the record states no guarantee; ε is the largest that a site reported."
    yield from _kinds_of_epsilon([run.guarantee for run in runs if run.guarantee and math.isfinite(run.epsilon)])
    yield from _stops(runs)
    if tuned := trials_note(runs):
        yield tuned


def _kinds_of_epsilon(stated: Sequence[Guarantee]) -> Iterator[str]:
    """ε compares with ε only at one δ, for one unit and relation, by one accountant."""
    units = Counter(f"{held.unit} by {held.relation}" for held in stated)
    deltas = Counter(f"{held.delta:g}" for held in sorted(stated, key=lambda held: held.delta))
    accountants = Counter(held.accountant.upper() for held in stated)
    if len(units) > 1:
        yield f"Different units of privacy in one table: {_runs_of(units)}. Their ε do not compare."
    if len(deltas) > 1:
        yield f"Different δ in one table: {_runs_of(deltas)}. At a larger δ the same noise has a smaller ε."
    if len(accountants) > 1:
        yield f"Different accountants in one table: {_runs_of(accountants)}. A smaller ε may be the accountant's."


def _stops(runs: Sequence[ReportedRun]) -> Iterator[str]:
    stopped = sum(found(run.record, "privacy", "resumed") is True for run in runs)
    dearer = [run.spent for run in runs if run.spent is not None and run.epsilon < run.spent < math.inf]
    if stopped:
        yield f"{stopped} of {len(runs)} runs were stopped and went on; rounds that died are charged all the same."
    if dearer:
        yield (
            f"{len(dearer)} of {len(runs)} runs were charged more than the ε that was asked for, up to "
            f"ε = {epsilon_text(max(dearer))}: see what they cost."
        )


def _runs_of(counts: Counter[str]) -> str:
    return one_line(", ".join(f"{name} ({counted(count, 'run')})" for name, count in counts.items()))
