"""Numbers and explanations as the tables, the figures and the page show them."""

from __future__ import annotations

import math
import re

from fedlora.experiments.report.comparison import Cell
from fedlora.experiments.report.results import ReportedRun
from fedlora.experiments.report.statistics import CONFIDENCE, FEWEST_PAIRS, RESAMPLES
from fedlora.privacy.units import rounded_up

READING = (
    "Metrics are measured on public validation data: mean ± standard deviation over seeds, in brackets the number of "
    "seeds. **Bold** is the highest mean of its column, all that tie; it does not say that the difference is "
    "significant, which the paired differences are for."
)
PAIRING = (
    f"Differences are paired by seed. The verdict follows from Student's {CONFIDENCE:.0%} interval for their mean. The "
    f"bootstrap interval ({CONFIDENCE:.0%}, percentiles, {RESAMPLES:,} resamples, seed 0) is for comparison: with "
    "few pairs a bootstrap is too narrow. Pairs of one seed at different ε share partition and initial values and are "
    "not independent: the pooled line first takes each seed's mean over all private ε, of seeds that have a pair at "
    f"every one, and counts seeds. Fewer than {FEWEST_PAIRS} seeds say nothing. No interval is corrected for how "
    "many are looked at: of twenty, about one misses by chance."
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


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
