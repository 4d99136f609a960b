"""What choosing settings by trials costs a record, together with the run that is reported.

The server and the other sites see every round of every trial. A choice made of that is post-processing, and what holds
is the composition of all trials with the run itself; the ε of the run alone does not.

**Where the record is.** It is at one site in each run. Runs that deal the same records by the same seed have it at the
same site; with another seed it may be at any. (That the others stay where they are is a convention of simulations:
adding one record would deal others anew under shuffling, and a generated corpus is another one under each seed.) The
bound is the largest ε over all such placements. Where these are many, or hardly differ, it is a bound for all of them
at once: of each phase the largest q, the smallest effective σ and the most steps of any site. That is never less,
because each of the three can be had by post-processing:

* fewer steps: forget some;
* more noise: add some;
* q' < q: with chance 1 - q'/q put noise alone in the place of a release. Where the record is absent this changes
  nothing, N(0, σ²) stays itself; where it is present, (1 - q) N(0, σ²) + q N(1, σ²) becomes the same with q'.

These pairs dominate a Poisson-sampled Gaussian under add/remove of one record, and composition keeps domination, also
where later runs depend on earlier ones (Zhu, Dong, Wang, "Optimal accounting of differential privacy via
characteristic function", AISTATS 2022).

**What must not be chosen.** All of this holds where q, σ and steps of every run, and the number of runs, are fixed
beforehand. A trial that failed, and one that was not made because it would have been another's twin, therefore count as
they were planned (`trial_charges`): that there was nothing more to run may have followed from releases. Where trials
choose them as well, as with the batch size, the privacy parameters themselves depend on what was released, and adding
up what they came to be proves nothing (Rogers et al., "Privacy odometers and filters", NeurIPS 2016). Then no finite
number is given.

Nor where clients' whole data are protected (privacy.unit = client): all of this is about a record at one site.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.experiments.sweeps.trial_charges import Record, Run, UnknownCharge, Unrecorded, deal_of, dearest, recorded
from fedlora.privacy.accounting import Charge, epsilon, merged

_MOST_PLACEMENTS = 64
_MOST_KINDS = 24
"""Different (q, σ) that are priced by PLD; above, by RDP, which is looser and costs milliseconds."""
_HARDLY = 1.001  # ratio of ε below which placements are not told apart


@dataclass(frozen=True, kw_only=True)
class TrialCost:
    """ε of all trials together with the run, for one record of one site, at the run's δ.

    Attributes:
        epsilon: upper bound; infinity where one of the runs promises nothing; None where it cannot be told.
        accountant: which method bounds it.
        reason: why there is no finite number; empty where there is one.
    """

    epsilon: float | None
    delta: float
    accountant: str = "pld"
    reason: str = ""


def cost_with_trials(own: Record, trials: Sequence[Record], others: Sequence[Unrecorded] = ()) -> TrialCost:
    """What a run cost a record, if its settings were chosen by trials.

    Args:
        own: record of the run.
        trials: records of the trials that are done and were made of private records.
        others: trials of the same choice that were planned and have no record.
    """
    runs, delta = [own, *trials], float(own["config"]["privacy"]["delta"])
    if not (all(record["private"] for record in runs) and all(other.promised for other in others)):
        return TrialCost(epsilon=math.inf, delta=delta, reason="a run without a guarantee is among them")
    deals: dict[str, list[Run]] = {}
    try:
        spent = [(deal_of(record["config"]), recorded(record)) for record in runs]
        for deal, run in (*spent, *(other.charges(trials) for other in others)):
            deals.setdefault(deal, []).append(run)
    except UnknownCharge as unknown:
        return TrialCost(epsilon=None, delta=delta, reason=str(unknown))
    bound, accountant = _worst(list(deals.values()), delta)
    return TrialCost(epsilon=bound, delta=delta, accountant=accountant)


def _worst(deals: Sequence[Sequence[Run]], delta: float) -> tuple[float, str]:
    """ε where it is largest, and how it was bounded.

    Args:
        deals: runs, together where they deal records alike, so that a record is at one site in all of them.
    """
    everywhere = [charge for runs in deals for run in runs for charge in dearest(run.values()).values()]
    accountant = "pld" if len(merged(everywhere)) <= _MOST_KINDS else "rdp"
    bound = epsilon(everywhere, delta, accountant)
    options = [{_at(site, runs) for site in set().union(*runs)} for runs in deals]
    placements = itertools.product(*options)
    somewhere = epsilon(list(itertools.chain(*next(placements))), delta, accountant)
    if bound <= _HARDLY * somewhere or math.prod(map(len, options)) > _MOST_PLACEMENTS:
        return bound, accountant
    others = (epsilon(list(itertools.chain(*placement)), delta, accountant) for placement in placements)
    return min(bound, max([somewhere, *others])), accountant


def _at(site: int, runs: Sequence[Run]) -> tuple[Charge, ...]:
    """All that one site spent; it may have been asked for nothing in a run."""
    return merged(charge for run in runs for charge in run.get(site, {}).values())
