"""Numbers and explanations as the tables, the figures and the page show them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from fedlora.experiments.report.comparison import Cell
from fedlora.experiments.report.results import ReportedRun, Results
from fedlora.experiments.report.statistics import CONFIDENCE, RESAMPLES
from fedlora.privacy.units import rounded_up

READING = (
    "Metrics are measured on public validation data: mean ± standard deviation over seeds, in brackets the number of "
    "seeds. **Bold** is the highest mean of its column, all that tie; it does not say that the difference is "
    "significant, which the paired differences below are for."
)
PAIRING = (
    f"Differences are paired by seed. The verdict follows from Student's {CONFIDENCE:.0%} interval for their mean. The "
    f"bootstrap interval ({CONFIDENCE:.0%}, percentiles, {RESAMPLES:,} resamples, seed 0) is for comparison: with "
    "few pairs a bootstrap is too narrow. Pairs of different ε with one seed share partition and initial values, so "
    "that the pooled line knows less than its number of pairs suggests. No interval is corrected for how many are "
    "looked at: of twenty, about one misses by chance."
)
COSTS = (
    "ε spent is that of the worst site over all seeds, rounded up. σ is the smallest effective noise multiplier of a "
    "site's training. Bytes are sent up by all sites together in a whole run; bytes and seconds are means over seeds."
)


def epsilon_text(epsilon: float) -> str:
    """Never less than it is."""
    return "∞" if math.isinf(epsilon) else f"{rounded_up(epsilon):g}"


def epsilon_title(epsilon: float | None) -> str:
    """Of a column or row; None is all private ones together."""
    if epsilon is None:
        return "all private ε, pooled"
    return f"ε = {epsilon_text(epsilon)}{' (no privacy)' if math.isinf(epsilon) else ''}"


def spent_text(run: ReportedRun) -> str:
    """ε of the worst site, and why it promises nothing where it does not."""
    if math.isinf(run.epsilon):
        return "no privacy"
    text = "not in the record" if run.spent is None else epsilon_text(run.spent)
    if run.guarantee is None or not run.guarantee.flaws:
        return text
    return f"no guarantee ({text} by count)" if run.guarantee.noise_seeded else "no guarantee"


def spent_of(cell: Cell) -> str:
    """The worst of a cell's runs; those without a guarantee come first."""
    worst = max(cell.runs, key=lambda run: (bool(run.guarantee and run.guarantee.flaws), run.spent or 0.0))
    return spent_text(worst)


def range_text(limits: tuple[float, float] | None) -> str:
    """One number where both ends print alike."""
    if limits is None:
        return "unknown"
    low, high = (f"{limit:.4g}" for limit in limits)
    return low if low == high else f"{low} to {high}"


def size_text(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return "unknown"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def seconds_text(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def markdown(text: str) -> str:
    """`text` as Markdown shows it, whatever signs it holds."""
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def guarantee_words(results: Results) -> list[str]:
    """What every ε of the report is about: unit, relation, δ, accountant, and what it leaves open."""
    stated = [run.guarantee for run in results.runs if run.guarantee and math.isfinite(run.epsilon)]
    if not stated:
        return ["No run here has a guarantee: nothing bounds what can be learnt about a record."]
    units, relations = _listed(g.unit for g in stated), _listed(g.relation for g in stated)
    deltas = _listed(f"{g.delta:g}" for g in sorted(stated, key=lambda g: g.delta))
    accountants = _listed(g.accountant.upper() for g in stated)
    return [
        f"Every ε is an upper bound for one {units} of one site ({relations}), against the server and every other "
        f"site, at δ = {deltas}, by {accountants} accounting.",
        f"Not covered: {stated[0].not_covered}.",
    ]


def odds(results: Results) -> list[tuple[str, str, str]]:
    """For each private ε: it, how many times likelier (e^ε), and how often at most a guess can be right.

    Whoever has to tell from all that leaves a site whether a record took part, both as likely beforehand, is right with
    probability at most (e^ε + δ) / (1 + e^ε). Source: Kairouz, Oh and Viswanath, The Composition Theorem for
    Differential Privacy (ICML 2015), section 2, from the hypothesis-testing region of (ε, δ).
    """
    rows = []
    for epsilon in (epsilon for epsilon in results.epsilons if math.isfinite(epsilon)):
        deltas = [r.guarantee.delta for r in results.runs if r.guarantee and r.epsilon == epsilon]
        delta = max(deltas, default=0.0)
        times = math.exp(min(epsilon, 700.0))  # what float64 can hold
        right = 1 - (1 - delta) / (1 + times)
        factor = f"{_up(times, 1):,.1f}" if times < 1e6 else f"{times:.1e}"
        rows.append((epsilon_text(epsilon), factor, _percent(right)))
    return rows


def _percent(share: float) -> str:
    return f"{_up(100 * share, 1):.1f} %" if share < 0.999 else f"{min(_up(100 * share, 3), 100):.3f} %"


def _up(value: float, digits: int) -> float:
    return math.ceil(value * 10.0**digits - 1e-9) / 10.0**digits


def _listed(texts: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(texts))
