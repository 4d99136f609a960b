"""What a choice by trials costs: as dp-accounting composes it, and never too little."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.experiments.simulate import simulate
from fedlora.experiments.sweeps.trial_cost import OUTSIDE_THE_PLAN, cost_with_trials
from fedlora.privacy.plan import make_plan

Site = tuple[float, float, int]
"""q, effective σ and steps of fine-tuning."""
DELTA = 1e-5


def record(*sites: Site, seed: int = 0, again: int = 0, **changes: Any) -> dict[str, Any]:
    """Of a run whose sites did one release with σ = 20 and then fine-tuning."""
    config = RunConfig().with_overrides(f"run.seed={seed}", "federation.local_steps=10")
    return {
        "config": config.to_mapping(),
        "private": True,
        "clients": [
            {
                "client": client,
                "phases": [
                    {
                        "name": "prototype",
                        "sampling_probability": 1.0,
                        "effective_noise_multiplier": 20.0,
                        "num_steps": 1,
                    },
                    {"name": "finetune", "sampling_probability": q, "effective_noise_multiplier": s, "num_steps": n},
                ],
            }
            for client, (q, s, n) in enumerate(sites)
        ],
        "privacy": {
            "sites": [{"client": c, "rounds_asked": 11, "rounds_charged": 11 + again} for c in range(len(sites))]
        },
    } | changes


def composed(sites: Sequence[Site], releases: int) -> float:
    """ε by dp-accounting alone."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(GaussianDpEvent(20.0), releases)
    for q, sigma, steps in sites:
        accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)
    return float(accountant.get_epsilon(DELTA))


SMALL, LARGE = (0.05, 0.9, 100), (0.01, 0.6, 100)  # a small site and a large one: neither is dearer in both q and σ


def test_trials_and_run_are_composed_as_dp_accounting_does() -> None:
    site = (0.02, 0.8, 100)
    cost = cost_with_trials(record(site), [record(site, seed=7)] * 3)
    assert cost.epsilon == pytest.approx(composed([site] * 4, releases=4), rel=2e-3)
    assert (cost.delta, cost.accountant, cost.reason) == (DELTA, "pld", "")


def test_no_trial_may_be_left_out() -> None:
    site = (0.02, 0.8, 100)
    one_less = composed([site] * 3, releases=3)
    cost = cost_with_trials(record(site), [record(site, seed=7)] * 3)
    assert cost.epsilon is not None
    assert cost.epsilon > 1.05 * one_less


def test_the_worst_site_is_found_where_runs_deal_records_anew() -> None:
    """Under another seed the record may have been at any other site."""
    worst = max(
        composed([trial] * 4 + [own], releases=5) for trial in (SMALL, LARGE) for own in (SMALL, LARGE)
    )  # fmt: skip
    cost = cost_with_trials(record(SMALL, LARGE), [record(SMALL, LARGE, seed=7)] * 4)
    assert cost.epsilon == pytest.approx(worst, rel=2e-3)
    mixed = cost_with_trials(record(SMALL), [record(LARGE, LARGE, seed=7), record(SMALL, LARGE, seed=8)])
    assert mixed.epsilon == pytest.approx(
        max(composed([SMALL, LARGE, SMALL], 3), composed([SMALL, LARGE, LARGE], 3)), rel=2e-3
    )


def test_a_record_stays_at_its_site_where_runs_deal_alike() -> None:
    turned = cost_with_trials(record(SMALL, LARGE), [record(LARGE, SMALL)])
    assert turned.epsilon == pytest.approx(composed([SMALL, LARGE], 2), rel=2e-3)
    same = cost_with_trials(record(SMALL, LARGE), [record(SMALL, LARGE)])
    assert same.epsilon == pytest.approx(max(composed([SMALL] * 2, 2), composed([LARGE] * 2, 2)), rel=2e-3)


def test_many_placements_are_bounded_by_the_worst_of_each_number() -> None:
    trials = [record(SMALL, LARGE, seed=seed) for seed in range(1, 8)]
    cost = cost_with_trials(record(SMALL, LARGE), trials)
    everywhere = composed([(0.05, 0.6, 800)], releases=8)
    assert cost.epsilon == pytest.approx(everywhere, rel=2e-3)
    assert everywhere > max(composed([SMALL] * 8, 8), composed([LARGE] * 8, 8))


@pytest.mark.parametrize(
    "flawed", [record((0.02, 0.8, 10), private=False), record((0.02, 0.0, 10))], ids=["no promise", "no noise"]
)
def test_a_run_that_promises_nothing_leaves_no_promise(flawed: dict[str, Any]) -> None:
    sound = record((0.02, 0.8, 10))
    assert cost_with_trials(sound, [sound, flawed]).epsilon == math.inf
    assert cost_with_trials(flawed, [sound]).epsilon == math.inf


def test_rounds_done_anew_are_charged_twice() -> None:
    cost = cost_with_trials(record((0.02, 0.8, 100), again=2), [])
    assert cost.epsilon == pytest.approx(composed([(0.02, 0.8, 120)], releases=3), rel=2e-3)


def test_a_failed_trial_is_charged_as_its_twin_was() -> None:
    site, failed = (0.02, 0.8, 100), RunConfig().with_overrides("run.seed=7", "training.learning_rate=1e6")
    failed = failed.with_overrides("federation.local_steps=10")
    cost = cost_with_trials(record(site), [record(site, seed=7)], [failed])
    assert cost.epsilon == pytest.approx(composed([site] * 3, releases=3), rel=2e-3)


@pytest.mark.parametrize("change", ["training.expected_batch_size=64", "run.seed=8", "federation.rounds=11"])
def test_a_failed_trial_without_a_twin_has_no_known_cost(change: str) -> None:
    site = (0.02, 0.8, 100)
    failed = RunConfig().with_overrides("run.seed=7", "federation.local_steps=10", change)
    cost = cost_with_trials(record(site), [record(site, seed=7)], [failed])
    assert cost.epsilon is None
    assert "failed" in cost.reason
    assert cost_with_trials(record(site), [], [None]).epsilon is None
    seeded = failed.with_overrides("privacy.seeded_noise=true")
    assert cost_with_trials(record(site), [], [seeded]).epsilon == math.inf


def test_a_site_that_never_answered_has_no_known_cost() -> None:
    silent = record((0.02, 0.8, 100))
    del silent["clients"][0]["phases"]
    assert cost_with_trials(record((0.02, 0.8, 100)), [silent]).epsilon is None


def test_many_kinds_of_noise_are_priced_by_a_looser_bound() -> None:
    sites = [(0.02, 0.8 + k / 100, 10) for k in range(30)]
    cost = cost_with_trials(record(sites[0]), [record(site) for site in sites[1:]])
    assert cost.accountant == "rdp"
    assert cost.epsilon is not None
    assert cost.epsilon > composed(sites, releases=30)


OTHER_VALUES: dict[str, Any] = {
    "training.optimizer": "adamw",
    "training.schedule": "constant",
    "training.weight_decay": 0.1,
    "training.noise_filter": "disk",
    "privacy.clipping": "automatic",
    "privacy.low_pass": 0.5,
    "adapter.target_modules": ["key"],
    "adapter.discretise": "global_topk",
    "adapter.sharing": "type",
    "model.dtype": "float32",
    "model.attention": "eager",
    "data.validation_part": "tuning",
    "run.device": "cpu",
    "run.transport": "flower",
    "run.out": "elsewhere",
    "engine.backend": "opacus",
    "engine.token_budget": 64,
    "engine.noise": "device",
}


def another(value: Any) -> Any:
    return not value if isinstance(value, bool) else 2 * value if isinstance(value, int) else value / 2


@pytest.mark.parametrize("mechanism", ["gaussian", "gredp"])
@pytest.mark.parametrize("name", OUTSIDE_THE_PLAN)
def test_settings_outside_the_plan_change_no_charge(name: str, mechanism: str) -> None:
    config = RunConfig().with_overrides(f"privacy.mechanism={mechanism}", "privacy.accountant=rdp")
    tables = config.to_mapping()
    section, _, key = name.partition(".")
    tables[section][key] = OTHER_VALUES[name] if name in OTHER_VALUES else another(tables[section][key])
    other = RunConfig.from_mapping(tables)
    assert other.digest() != config.digest() or name in ("run.out", "run.transport")

    def charges(of: RunConfig) -> list[Any]:
        plan = make_plan(of, num_examples=2000, num_steps={"finetune": 20}, client=0)
        return [phase.charge() for phase in plan.phases]

    assert charges(other) == charges(config)


class Silent:
    def start(self, config: RunConfig, **public: Any) -> None: ...

    def round(self, report: Any) -> None: ...

    def finish(self, *public: Any) -> None: ...


def test_a_real_record_is_read(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """One site, no trial: what is left is what the run itself says."""
    config = tiny_config("privacy.seeded_noise=false", "model.head=prototype", f"run.out='{tmp_path / 'run'}'")
    own = json.loads((simulate(config, Silent()) / "record.json").read_text())
    cost = cost_with_trials(own, [])
    assert cost.epsilon == pytest.approx(own["privacy"]["guarantee"]["epsilon"], rel=2e-3)
    twice = cost_with_trials(own, [own])
    assert twice.epsilon is not None
    assert twice.epsilon > 1.3 * own["privacy"]["guarantee"]["epsilon"]
