"""What a choice by trials costs: as dp-accounting composes it, and never too little."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import simulate
from fedlora.experiments.sweeps.trial_charges import OUTSIDE_THE_PLAN, Unrecorded
from fedlora.experiments.sweeps.trial_cost import cost_with_trials
from fedlora.privacy.accounting import Charge
from fedlora.privacy.ledger import DataSet, Ledger, Request
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


SITE = (0.02, 0.8, 100)
PLAN = RunConfig().with_overrides("run.seed=7", "federation.local_steps=10", "training.learning_rate=1e6")
"""Of a trial that failed: as those of `record`, but for what costs nothing."""


def folder_of(place: Path, rounds: int, *, abandoned: int = 0) -> RunFolder:
    """Of a run whose site 0 was charged for the release and for some rounds of 10 steps, `abandoned` of them anew."""
    folder = RunFolder(place)
    place.mkdir()
    folder.mark_asked(0)
    with contextlib.closing(Ledger.open(folder.ledger_file)) as ledger:

        def charge(index: int, purpose: str, price: Charge) -> None:
            owner = DataSet(fingerprint="client 0", name="client 0")
            request = Request(data_set=owner, charge=price, run="r", round_index=index, purpose=purpose)
            ledger.settle(ledger.reserve([request]))

        charge(0, "prototype", Charge(1.0, 20.0, 1))
        for index in range(1, rounds + 1):
            for _ in range(abandoned if index == rounds else 0):
                charge(index, "finetune", Charge(0.02, 0.8, 10))
                ledger.abandon("r", from_round=index)
            charge(index, "finetune", Charge(0.02, 0.8, 10))
    return folder


def test_a_failed_trial_counts_as_all_that_was_planned(tmp_path: Path) -> None:
    """How far it got, and that nothing is left of it, can follow from what was released."""
    wanted = pytest.approx(composed([SITE] * 3, releases=3), rel=2e-3)
    for folder in (None, RunFolder(tmp_path / "never made"), folder_of(tmp_path / "stopped", rounds=3)):
        failed = Unrecorded(config=PLAN, folder=folder)
        assert cost_with_trials(record(SITE), [record(SITE, seed=7)], [failed]).epsilon == wanted
        twin_was_stopped = cost_with_trials(record(SITE), [record(SITE, seed=7, again=2)], [failed])
        assert twin_was_stopped.epsilon == pytest.approx(composed([(0.02, 0.8, 320)], releases=5), rel=2e-3)


def test_what_a_failed_trial_did_anew_is_charged_by_its_ledger(tmp_path: Path) -> None:
    """Killed five times in its last round, then it failed."""
    failed = Unrecorded(config=PLAN, folder=folder_of(tmp_path / "run", rounds=10, abandoned=5))
    cost = cost_with_trials(record(SITE), [record(SITE, seed=7)], [failed])
    assert cost.epsilon == pytest.approx(composed([SITE, SITE, (0.02, 0.8, 150)], releases=3), rel=2e-3)


def test_a_ledger_that_says_more_than_the_plan_is_believed(tmp_path: Path) -> None:
    failed = Unrecorded(config=PLAN, folder=folder_of(tmp_path / "run", rounds=14))
    cost = cost_with_trials(record(SITE), [record(SITE, seed=7)], [failed])
    assert cost.epsilon == pytest.approx(composed([SITE, SITE, (0.02, 0.8, 140)], releases=3), rel=2e-3)


@pytest.mark.parametrize("fault", ["lost", "emptied", "another file", "altered"])
def test_a_failed_trial_whose_ledger_cannot_be_read_has_no_known_cost(tmp_path: Path, fault: str) -> None:
    folder = folder_of(tmp_path / "run", rounds=2)
    if fault == "lost":
        folder.ledger_file.unlink()
    elif fault == "altered":
        with sqlite3.connect(folder.ledger_file) as connection:
            connection.execute("UPDATE entry SET noise_multiplier = 80 WHERE id = 3")
        connection.close()
    else:
        folder.ledger_file.write_text("" if fault == "emptied" else "no ledger " * 500)
    cost = cost_with_trials(record(SITE), [record(SITE, seed=7)], [Unrecorded(config=PLAN, folder=folder)])
    assert cost.epsilon is None
    assert "its ledger" in cost.reason


def test_a_failed_trial_with_a_seed_of_its_own_counts_as_the_dearest() -> None:
    """Nothing tells of which sizes its sites were."""
    failed = Unrecorded(config=PLAN.with_overrides("run.seed=8"))
    cost = cost_with_trials(record(SMALL), [record(SMALL, LARGE, seed=7)], [failed])
    worst = max(composed([SMALL, site, (0.05, 0.6, 100)], releases=3) for site in (SMALL, LARGE))
    assert cost.epsilon == pytest.approx(worst, rel=2e-3)


@pytest.mark.parametrize("change", ["training.expected_batch_size=64", "federation.rounds=11"])
def test_a_failed_trial_with_a_plan_of_its_own_has_no_known_cost(change: str) -> None:
    failed = Unrecorded(config=PLAN.with_overrides(change))
    cost = cost_with_trials(record(SITE), [record(SITE, seed=7)], [failed])
    assert cost.epsilon is None
    assert "failed" in cost.reason
    assert cost_with_trials(record(SITE), [], [Unrecorded(config=PLAN)]).epsilon is None
    assert cost_with_trials(record(SITE), [record(SITE)], [Unrecorded(config=None)]).epsilon is None
    seeded = Unrecorded(config=PLAN.with_overrides("privacy.seeded_noise=true"))
    assert cost_with_trials(record(SITE), [record(SITE, seed=7)], [seeded]).epsilon == math.inf


def test_a_site_that_never_answered_has_no_known_cost() -> None:
    silent = record((0.02, 0.8, 100))
    del silent["clients"][0]["phases"]
    assert cost_with_trials(record((0.02, 0.8, 100)), [silent]).epsilon is None


def test_where_clients_are_protected_nothing_can_be_said_of_a_record() -> None:
    sound, other = record(SITE), record(SITE)
    other["config"]["privacy"]["unit"] = "client"
    planned = Unrecorded(config=PLAN.with_overrides("privacy.unit=client", "model.head=frozen"))
    for own, trials, others in ((other, [], []), (sound, [other], []), (sound, [sound], [planned])):
        cost = cost_with_trials(own, trials, others)
        assert cost.epsilon is None
        assert "privacy.unit = client" in cost.reason
    old = record(SITE)
    del old["config"]["privacy"]["unit"]
    assert cost_with_trials(old, []).epsilon is not None, "records of before there was a choice"


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
    "engine.matmul_precision": "high",
    "engine.compile": "on",
    "engine.prefix_cache": "off",
    "run.workers": 2,
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
    assert other.digest() != config.digest() or name in ("run.out", "run.workers", "run.transport")

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
