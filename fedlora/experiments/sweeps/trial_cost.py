"""What choosing settings by trials costs a record, together with the run that is reported.

The server and the other sites see every round of every trial. A choice made of that is post-processing, and what holds
is the composition of all trials with the run itself; the ε of the run alone does not.

**Where the record is.** It is at one site in each run. Runs that deal the same records by the same seed have it at the
same site; with another seed it may be at any. The bound is the largest ε over all such placements. Where these are
many, or hardly differ, it is a bound for all of them at once: of each phase the largest q, the smallest effective σ
and the most steps of any site. That is never less, because each of the three can be had by post-processing:

* fewer steps: forget some;
* more noise: add some;
* q' < q: with chance 1 - q'/q put noise alone in the place of a release. Where the record is absent this changes
  nothing, N(0, σ²) stays itself; where it is present, (1 - q) N(0, σ²) + q N(1, σ²) becomes the same with q'.

These pairs dominate a Poisson-sampled Gaussian under add/remove of one record, and composition keeps domination, also
where later runs depend on earlier ones (Zhu, Dong, Wang, "Optimal accounting of differential privacy via
characteristic function", AISTATS 2022).

**What must not be chosen.** All of this holds where q, σ and steps of every run are fixed beforehand. Where trials
choose them as well, as with the batch size, the privacy parameters themselves depend on what was released, and adding
up what they came to be proves nothing (Rogers et al., "Privacy odometers and filters", NeurIPS 2016). Then no finite
number is given.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config import RunConfig
from fedlora.privacy.accounting import Charge, epsilon, merged

_MOST_PLACEMENTS = 64
_MOST_KINDS = 24
"""Different (q, σ) that are priced by PLD; above, by RDP, which is looser and costs milliseconds."""
_HARDLY = 1.001  # ratio of ε below which placements are not told apart

OUTSIDE_THE_PLAN = (
    *("training.learning_rate", "training.optimizer", "training.schedule", "training.momentum"),
    *("training.weight_decay", "training.noise_filter", "training.filter_gain", "training.keep_state"),
    *("privacy.clip_norm", "privacy.clipping", "privacy.low_pass", "adapter.rank", "adapter.alpha"),
    *("adapter.target_modules", "adapter.ratio", "adapter.discretise", "adapter.sharing", "adapter.warm_start"),
    *("adapter.gate_learning_rate", "model.temperature"),
    *("model.dtype", "model.attention", "data.validation_part", "data.max_length"),
    *("run.device", "run.transport", "run.evaluate_every", "run.out"),
    *("engine.backend", "engine.token_budget", "engine.noise"),
)
"""Settings that change no site's q, σ or steps."""

Record = Mapping[str, Any]
Phases = Mapping[str, Charge]
"""What one run cost a record at one site, by phase."""
Run = Mapping[int, Phases]
"""The same of all sites."""


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


class _Unknown(Exception):
    """Records do not tell what was spent; the message says why."""


def cost_with_trials(own: Record, trials: Sequence[Record], failed: Sequence[RunConfig | None] = ()) -> TrialCost:
    """What a run cost a record, if its settings were chosen by trials.

    Args:
        own: record of the run.
        trials: records of the trials that are done and were made of private records.
        failed: what the trials that failed were to do, which they may have released; None where that is not known.
    """
    runs, delta = [own, *trials], float(own["config"]["privacy"]["delta"])
    promised = all(record["private"] for record in runs) and all(map(_promised, failed))
    if not promised:
        return TrialCost(epsilon=math.inf, delta=delta, reason="a run without a guarantee is among them")
    deals: dict[str, list[Run]] = {}
    try:
        for record in (*runs, *(_twin(config, runs) for config in failed)):
            deals.setdefault(_deal(record), []).append(_spent(record))
    except _Unknown as unknown:
        return TrialCost(epsilon=None, delta=delta, reason=str(unknown))
    bound, accountant = _worst(list(deals.values()), delta)
    return TrialCost(epsilon=bound, delta=delta, accountant=accountant)


def _promised(config: RunConfig | None) -> bool:
    return config is None or (config.private and not config.privacy.seeded_noise)


def _worst(deals: Sequence[Sequence[Run]], delta: float) -> tuple[float, str]:
    """ε where it is largest, and how it was bounded.

    Args:
        deals: runs, together where they deal records alike, so that a record is at one site in all of them.
    """
    everywhere = [charge for runs in deals for run in runs for charge in _dearest(run)]
    accountant = "pld" if len(merged(everywhere)) <= _MOST_KINDS else "rdp"
    bound = epsilon(everywhere, delta, accountant)
    options = [{_at(site, runs) for site in set().union(*runs)} for runs in deals]
    placements = itertools.product(*options)
    somewhere = epsilon(list(itertools.chain(*next(placements))), delta, accountant)
    if bound <= _HARDLY * somewhere or math.prod(map(len, options)) > _MOST_PLACEMENTS:
        return bound, accountant
    others = (epsilon(list(itertools.chain(*placement)), delta, accountant) for placement in placements)
    return min(bound, max([somewhere, *others])), accountant


def _dearest(run: Run) -> list[Charge]:
    """Phase by phase no less than any site spent."""
    names = {name for phases in run.values() for name in phases}
    alike = ([phases[name] for phases in run.values() if name in phases] for name in sorted(names))
    return [
        Charge(
            max(charge.sampling_probability for charge in charges),
            min(charge.noise_multiplier for charge in charges),
            max(charge.num_steps for charge in charges),
        )
        for charges in alike
    ]


def _at(site: int, runs: Sequence[Run]) -> tuple[Charge, ...]:
    """All that one site spent; it may have been asked for nothing in a run."""
    return merged(charge for run in runs for charge in run.get(site, {}).values())


def _spent(record: Record) -> Run:
    """By site and phase. A round that was done anew after a stop may have been one of any phase: each is charged.

    Raises:
        _Unknown: a site was never heard of, or the record is of an old kind.
    """
    try:
        again = {site["client"]: site["rounds_charged"] - site["rounds_asked"] for site in record["privacy"]["sites"]}
        most = record["config"]["federation"]["local_steps"]
        return {
            facts["client"]: {phase["name"]: _charge(phase, again[facts["client"]], most) for phase in facts["phases"]}
            for facts in record["clients"]
        }
    except KeyError as missing:
        raise _Unknown(f"a record does not tell {missing} of every site") from missing


def _charge(phase: Mapping[str, Any], rounds_again: int, most: int) -> Charge:
    steps: int = phase["num_steps"]
    steps += rounds_again * min(steps, most)
    return Charge(phase["sampling_probability"], phase["effective_noise_multiplier"], steps)


def _deal(record: Record) -> str:
    """What decides which site has which record."""
    config = record["config"]
    return json.dumps([config["data"], config["federation"]["clients"], config["run"]["seed"]], sort_keys=True)


def _twin(config: RunConfig | None, runs: Sequence[Record]) -> Record:
    """A run that was planned with the same q, σ and steps at every site as the one that failed.

    Raises:
        _Unknown: there is none.
    """
    wanted = None if config is None else _planned(config.to_mapping())
    for record in runs:
        if _planned(record["config"]) == wanted:
            return record
    raise _Unknown("a trial failed, and no other run tells what it may have released before")


def _planned(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings that decide what a run costs."""
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    return {name: value for name, value in flat.items() if name not in OUTSIDE_THE_PLAN}
