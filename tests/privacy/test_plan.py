"""One object holds sampling, clipping, noise and accounting: what is charged is what runs."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

from fedlora.config import RunConfig
from fedlora.engine.batching import Shapes
from fedlora.engine.training import TrainingJob, train
from fedlora.errors import BudgetRefused, DataError, PrivacyError, UnsoundMechanism
from fedlora.privacy import accounting
from fedlora.privacy.accounting import Charge
from fedlora.privacy.mechanisms.gredp import GReDPMechanism
from fedlora.privacy.noise import HostNoise
from fedlora.privacy.phases import ALIGNMENT, BILEVEL, FINETUNE, PROTOTYPE, WARMUP
from fedlora.privacy.plan import PrivacyPlan, make_plan
from fedlora.randomness import SecretRoot

N, ROUNDS = 2000, 5


def config(*overrides: str) -> RunConfig:
    return RunConfig().with_overrides(
        "federation.rounds=5", "federation.local_steps=4", "training.expected_batch_size=50", *overrides
    )


def plan_of(*overrides: str, num_examples: int = N, num_rounds: int = ROUNDS) -> PrivacyPlan:
    return make_plan(config(*overrides), num_examples=num_examples, num_steps={FINETUNE: 4 * num_rounds}, client=3)


# ------------------------------------------------------------------------------------------------- meeting the target


@pytest.mark.parametrize("target", [0.5, 1.0, 6.0])
@pytest.mark.parametrize("head", ["prototype", "frozen"])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_all_phases_together_meet_the_target_and_waste_little_of_it(target: float, head: str, accountant: str) -> None:
    plan = plan_of(f"privacy.epsilon={target}", f"model.head={head}", f"privacy.accountant={accountant}")
    together = accounting.epsilon([phase.charge() for phase in plan.phases], plan.delta, accountant)
    assert plan.epsilon() == together
    assert 0.98 * target <= together <= target
    assert [phase.name for phase in plan.phases] == [PROTOTYPE, FINETUNE][head == "frozen" :]


def test_the_prototype_release_is_paid_out_of_the_same_budget() -> None:
    alone, shared = plan_of("model.head=frozen", "privacy.epsilon=1"), plan_of("privacy.epsilon=1")
    assert shared[FINETUNE].mechanism.noise_multiplier > alone[FINETUNE].mechanism.noise_multiplier
    assert shared[PROTOTYPE].charge() == Charge(1.0, 20.0, 1)
    assert shared[PROTOTYPE].sensitivity == pytest.approx(math.sqrt(2), rel=1e-12)
    assert plan_of("privacy.prototype_noise_multiplier=7")[PROTOTYPE].charge() == Charge(1.0, 7.0, 1)


def test_a_prototype_release_that_costs_more_than_everything_is_refused() -> None:
    with pytest.raises(BudgetRefused):
        plan_of("privacy.epsilon=0.1", "privacy.prototype_noise_multiplier=1")


def test_without_privacy_epsilon_is_infinite_everywhere() -> None:
    plan = plan_of("privacy.epsilon=inf")
    assert plan.epsilon() == math.inf
    assert all(phase.mechanism.noise_multiplier == 0 for phase in plan.phases)
    assert accounting.epsilon_curve([[phase.charge()] for phase in plan.phases], plan.delta) == [math.inf] * 2
    total = torch.ones(4, dtype=torch.float64)
    noise = HostNoise(np.random.default_rng(0))
    assert torch.equal(plan[FINETUNE].privatize(total, noise=noise, slot_sizes=(4,)), torch.ones(4))


def test_more_steps_or_less_epsilon_mean_more_noise() -> None:
    noise = [plan_of(f"privacy.epsilon={e}")[FINETUNE].mechanism.noise_multiplier for e in (8, 4, 2, 1)]
    assert noise == sorted(noise)
    assert len(set(noise)) == 4
    few, many = (plan_of(num_rounds=rounds)[FINETUNE].mechanism.noise_multiplier for rounds in (2, 10))
    assert few < many


def test_a_site_that_never_trains_is_charged_nothing_for_training() -> None:
    plan = plan_of("model.head=frozen", num_rounds=0)
    assert plan[FINETUNE].num_steps == 0
    assert plan.epsilon() == 0.0


# ------------------------------------------------------------------------------------------------------- mechanisms


def test_gredp_is_charged_for_the_noise_that_it_releases() -> None:
    """Whatever the reading, the accountant gets what plain Gaussian noise would have to be."""
    plain = plan_of()[FINETUNE].mechanism
    whole, half = (plan_of("privacy.mechanism=gredp", f"privacy.gredp_noise={n}") for n in ("complex", "complex_half"))
    assert whole[FINETUNE].mechanism == GReDPMechanism(plain.noise_multiplier)
    assert half[FINETUNE].mechanism.noise_multiplier == pytest.approx(math.sqrt(2) * plain.noise_multiplier)
    for plan in (whole, half):
        record = plan.describe({PROTOTYPE: 1, FINETUNE: 20}, spent=plan.epsilon())
        assert record["mechanism"] == "gredp"
        assert record["noise_multiplier"] == plan[FINETUNE].mechanism.noise_multiplier
        assert record["effective_noise_multiplier"] == pytest.approx(plain.noise_multiplier, rel=1e-12)
        assert plan.epsilon() == pytest.approx(plan_of().epsilon(), rel=1e-9)
        assert plan.epsilon() <= 6.0


REAL = ("privacy.mechanism=gredp", "privacy.gredp_noise=real")


def test_a_mechanism_that_protects_nothing_is_refused_with_exit_code_3() -> None:
    for target in ("6", "inf"):
        with pytest.raises(UnsoundMechanism, match=r"in clear.*Set privacy.gredp_noise=complex") as refused:
            plan_of(*REAL, f"privacy.epsilon={target}")
        assert refused.value.exit_code == 3
        assert "\n" not in str(refused.value)


def test_allowed_all_the_same_it_runs_with_nominal_noise_at_infinite_epsilon() -> None:
    plan = plan_of(*REAL, "privacy.allow_unsound=true", "privacy.gredp_over=flat")
    assert plan[FINETUNE].mechanism == GReDPMechanism(plan_of()[FINETUNE].mechanism.noise_multiplier, "real", "flat")
    assert plan.epsilon() == math.inf
    assert plan[FINETUNE].charge() == Charge(50 / N, 0.0, 20)
    assert plan[PROTOTYPE].charge() == Charge(1.0, 20.0, 1)
    record = plan.describe({PROTOTYPE: 1, FINETUNE: 20}, spent=plan.epsilon())
    assert (record["epsilon"], record["effective_noise_multiplier"]) == (math.inf, 0.0)
    assert record["noise_multiplier"] == plan_of()[FINETUNE].mechanism.noise_multiplier
    with pytest.raises(DataError, match=r"Set privacy\.delta below"):
        plan_of(*REAL, "privacy.allow_unsound=true", "privacy.delta=0.01")


# ----------------------------------------------------------------------------------------------------------- search

SEARCHES = ("warmup", "alignment", "bilevel")
STEPS = {WARMUP: 8, BILEVEL: 12, FINETUNE: 40}


def search_plan(select: str, *overrides: str, num_examples: int = N, **steps: int) -> PrivacyPlan:
    """Of a site that does `steps`, or 8 of warm-up, 12 of weights and gates in turn and 40 of fine-tuning."""
    planned = {phase: count for phase, count in (steps or STEPS).items() if phase != BILEVEL or select == "bilevel"}
    asked = config(f"adapter.select={select}", "federation.rounds=15", *overrides)
    return make_plan(asked, num_examples=num_examples, num_steps=planned, client=3)


def composed(releases: list[tuple[float, float, int]], delta: float) -> float:
    """dp-accounting's own ε of releases by sampling probability, noise multiplier and number of steps."""
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    exact = PLDAccountant(value_discretization_interval=1e-4)
    for probability, multiplier, count in releases:
        event: Any = dp_event.GaussianDpEvent(multiplier)
        if probability < 1:
            event = dp_event.PoissonSampledDpEvent(probability, event)
        exact.compose(dp_event.SelfComposedDpEvent(event, count))
    return float(exact.get_epsilon(delta))


@pytest.mark.parametrize("target", [1.0, 6.0])
@pytest.mark.parametrize("head", ["prototype", "frozen"])
@pytest.mark.parametrize("select", SEARCHES)
def test_search_and_fine_tuning_together_cost_what_dp_accounting_composes(
    select: str, head: str, target: float
) -> None:
    """Every phase written down by hand from batch, n and one σ; the plan may cost 0.1 % more and never less."""
    plan = search_plan(select, f"model.head={head}", f"privacy.epsilon={target}")
    sigma, q = plan[FINETUNE].mechanism.noise_multiplier, 50 / N
    releases = [(1.0, 20.0, 1)] if head == "prototype" else []
    releases += [(q, sigma, 8), (q, sigma, 40)]
    releases += {"warmup": [], "alignment": [(1.0, 20.0, 1)], "bilevel": [(2 * q, sigma, 12)]}[select]
    independent = composed(releases, plan.delta)
    assert independent * (1 - 1e-6) <= plan.epsilon() <= independent * (1 + 1e-3)
    assert 0.98 * target <= plan.epsilon() <= target


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("select", SEARCHES)
def test_all_training_has_one_noise_multiplier(select: str, accountant: str) -> None:
    plan = search_plan(select, f"privacy.accountant={accountant}")
    trained = [phase for phase in plan.phases if phase.name in STEPS]
    assert {phase.name: phase.num_steps for phase in trained} == {
        name: count for name, count in STEPS.items() if name != BILEVEL or select == "bilevel"
    }
    assert len({phase.mechanism.noise_multiplier for phase in trained}) == 1
    assert {phase.clipping for phase in trained} == {plan[FINETUNE].clipping}
    assert plan.epsilon() == accounting.epsilon([phase.charge() for phase in plan.phases], plan.delta, accountant)
    assert 0.98 * 6 <= plan.epsilon() <= 6


def test_the_alignment_release_at_sigma_20_costs_less_than_a_hundredth_at_epsilon_4() -> None:
    """q = .05, T = 300, δ = 1e-5: from 4.000 to 4.006 (notes on DiffoRA, table 6.1)."""
    settings = ("model.head=frozen", "privacy.epsilon=4")
    alone = search_plan("warmup", *settings, num_examples=1000, warmup=60, finetune=240)
    without = alone.epsilon()
    beside = accounting.epsilon([*(phase.charge() for phase in alone.phases), Charge(1.0, 20.0, 1)], alone.delta)
    assert without == pytest.approx(4.0, rel=2e-3)
    assert beside - without == pytest.approx(0.006, abs=1e-3)
    plan = search_plan("alignment", *settings, num_examples=1000, warmup=60, finetune=240)
    assert plan[ALIGNMENT].charge() == Charge(1.0, 20.0, 1)
    training = accounting.epsilon([plan[WARMUP].charge(), plan[FINETUNE].charge()], plan.delta)
    assert 0 < plan.epsilon() - training < 0.01
    assert plan.epsilon() <= 4


def test_the_alignment_release_has_sensitivity_one_and_the_noise_asked_for() -> None:
    phase = search_plan("alignment", "privacy.alignment_noise_multiplier=7", "privacy.clip_norm=0.3")[ALIGNMENT]
    assert phase.charge() == Charge(1.0, 7.0, 1)
    assert (phase.sensitivity, phase.clipping.kind, phase.projection) == (1.0, "automatic", None)
    with pytest.raises(BudgetRefused, match=r"privacy\.alignment_noise_multiplier"):
        search_plan("alignment", "privacy.epsilon=1", "privacy.alignment_noise_multiplier=1")


@pytest.mark.parametrize(("records", "probability"), [(1, 1 / N), (100, 0.05), (N, 1.0), (10 * N, 1.0)])
def test_scores_of_some_records_are_charged_at_the_rate_they_are_sampled_at(records: int, probability: float) -> None:
    plan = search_plan("alignment", f"adapter.alignment_records={records}", "privacy.alignment_noise_multiplier=2")
    phase = plan[ALIGNMENT]
    assert phase.sampler.sampling_probability == probability
    assert phase.charge() == Charge(probability, 2.0, 1)
    sigma = plan[FINETUNE].mechanism.noise_multiplier
    independent = composed([(1.0, 20.0, 1), (50 / N, sigma, 48), (probability, 2.0, 1)], plan.delta)
    assert independent * (1 - 1e-6) <= plan.epsilon() <= independent * (1 + 1e-3)
    assert plan.epsilon() <= 6


def test_halves_are_sampled_at_twice_the_rate_and_one_charge_stands_for_both() -> None:
    plan = search_plan("bilevel", "privacy.clip_norm=0.3", "privacy.low_pass=0.5")
    weights = plan[BILEVEL]
    assert weights.charge() == Charge(2 * 50 / N, plan[FINETUNE].mechanism.effective_noise_multiplier, 12)
    assert (weights.clipping, weights.projection) == (plan[FINETUNE].clipping, plan[FINETUNE].projection)
    gates = weights.beside
    assert gates is not None
    assert gates.charge() == weights.charge()
    assert (gates.sensitivity, gates.clipping.kind, gates.projection) == (1.0, "automatic", None)
    assert [phase.name for phase in plan.phases] == [PROTOTYPE, WARMUP, BILEVEL, FINETUNE]


@pytest.mark.parametrize("noise", ["complex", "complex_half"])
def test_gates_get_the_noise_that_the_weights_mechanism_is_charged_for(noise: str) -> None:
    """Whatever GReDP calls its σ."""
    weights = search_plan("bilevel", "privacy.mechanism=gredp", f"privacy.gredp_noise={noise}")[BILEVEL]
    assert weights.beside is not None
    assert weights.beside.mechanism.noise_multiplier == weights.charge().noise_multiplier
    assert weights.charge() == search_plan("bilevel")[BILEVEL].charge()


@pytest.mark.parametrize(
    "dearer",
    [Charge(0.0501, 1.5, 12), Charge(0.05, 1.4999, 12), Charge(0.05, 1.5, 13), Charge(0.01, 1.0, 1)],
    ids=["samples more", "less noise", "more steps", "less noise, though cheaper in all"],
)
def test_gates_that_cost_more_than_what_is_charged_for_both_are_refused(make_phase: Any, dearer: Charge) -> None:
    def phase(charge: Charge) -> Any:
        return make_phase(charge.sampling_probability, charge.noise_multiplier, num_steps=charge.num_steps)

    weights = phase(Charge(0.05, 1.5, 12))
    for no_dearer in (Charge(0.05, 1.5, 12), Charge(0.04, 1.6, 11), Charge(0.05, 1.5, 0)):
        assert dataclasses.replace(weights, beside=phase(no_dearer)).charge() == weights.charge()
    with pytest.raises(PrivacyError, match=r"samples more, has less noise or more steps.*pay for both") as refused:
        dataclasses.replace(weights, beside=phase(dearer))
    assert refused.value.exit_code == 3


def test_a_batch_larger_than_half_the_sites_data_is_refused_for_bilevel_alone() -> None:
    with pytest.raises(DataError, match=r"expected_batch_size = 50 is more than half the records of client 3") as error:
        search_plan("bilevel", num_examples=99)
    assert "\n" not in str(error.value)
    assert search_plan("bilevel", num_examples=100)[BILEVEL].sampler.sampling_probability == 1.0
    assert search_plan("alignment", num_examples=99).epsilon() <= 6


@pytest.mark.parametrize("steps", [{BILEVEL: 12}, {BILEVEL: 12, WARMUP: 8}, {FINETUNE: 40}], ids=str)
def test_a_site_that_is_asked_for_some_phases_only_gets_noise_for_these(steps: dict[str, int]) -> None:
    """Under partial participation a site may search without ever training, and the other way round."""
    plan = search_plan("bilevel", "model.head=frozen", "privacy.epsilon=2", **steps)
    assert 0.98 * 2 <= plan.epsilon() <= 2


def test_a_search_without_privacy_has_no_noise_anywhere() -> None:
    for select in SEARCHES:
        plan = search_plan(select, "privacy.epsilon=inf", "model.head=frozen")
        besides = [phase.beside for phase in plan.phases if phase.beside is not None]
        assert len(besides) == (select == "bilevel")
        assert all(phase.mechanism.noise_multiplier == 0 for phase in [*plan.phases, *besides])
        assert plan.epsilon() == math.inf


# -------------------------------------------------------------------------------------------------------- refusals


def test_delta_that_is_not_below_one_over_n_is_refused() -> None:
    for delta in (1 / N, 2 / N):
        with pytest.raises(DataError, match=r"client 3 \(2000 records\).*Set privacy.delta below"):
            plan_of(f"privacy.delta={delta!r}")
    assert plan_of(f"privacy.delta={math.nextafter(1 / N, 0)!r}").epsilon() <= 6.0


def test_a_batch_larger_than_the_sites_data_is_refused() -> None:
    with pytest.raises(DataError, match=r"expected_batch_size = 50, but client 3 has 49 records; set it to at most 49"):
        plan_of(num_examples=49)
    assert plan_of("model.head=frozen", num_examples=50)[FINETUNE].sampler.sampling_probability == 1.0


def test_a_delta_that_is_too_large_does_not_matter_without_privacy() -> None:
    assert plan_of("privacy.epsilon=inf", "privacy.delta=0.1").epsilon() == math.inf


# ------------------------------------------------------------------------------------- what is charged is what runs


def test_the_charge_is_read_from_the_objects_that_run() -> None:
    plan = plan_of()
    for phase in plan.phases:
        charge = phase.charge()
        assert charge.sampling_probability == phase.sampler.sampling_probability
        assert charge.noise_multiplier == phase.mechanism.effective_noise_multiplier
        assert charge.num_steps == phase.num_steps
        assert phase.sensitivity == phase.clipping.clip_norm
    finetune = plan[FINETUNE]
    assert finetune.sampler.sampling_probability == 50 / N
    assert finetune.num_steps == ROUNDS * 4
    assert finetune.charge(3).num_steps == 3
    assert (finetune.clipping.kind, finetune.clipping.clip_norm) == ("flat", 1.0)
    automatic = plan_of("privacy.clipping=automatic", "privacy.clip_norm=0.3")[FINETUNE]
    assert (automatic.clipping.kind, automatic.sensitivity) == ("automatic", 0.3)


def test_training_on_a_plan_samples_with_expected_batch_size_over_n(table_backend: Any) -> None:
    """Exact two-sided binomial bound on all inclusions together, false alarms 1e-6; 0.9 q and 1.1 q are outside."""
    plan, steps = plan_of("model.head=frozen"), 150
    backend = table_backend(torch.zeros(N, 1))
    job = TrainingJob(
        records=np.arange(N),
        phase=plan[FINETUNE],
        sampling=SecretRoot.seeded(0).numpy("sampling"),
        noise=HostNoise(SecretRoot.seeded(0).numpy("noise")),
    )
    train(
        backend,
        backend.dataset,
        [job],
        torch.zeros(1),
        num_steps=steps,
        learning_rate=1.0,
        training=config().training,
        shapes=Shapes(100_000),
    )
    asked = sum(len(records) for records, _ in backend.asked)
    q, trials = plan[FINETUNE].charge().sampling_probability, N * steps
    for scale, fits in ((1.0, True), (0.9, False), (1.1, False)):
        low, high = binom.ppf(5e-7, trials, scale * q), binom.isf(5e-7, trials, scale * q)
        assert (low <= asked <= high) == fits


# ------------------------------------------------------------------------------------------------- the public record


@pytest.mark.parametrize("select", ["none", *SEARCHES])
@pytest.mark.parametrize("head", ["prototype", "frozen"])
def test_epsilon_can_be_derived_from_the_record_alone(head: str, select: str) -> None:
    settings = (f"model.head={head}", "privacy.epsilon=3")
    plan = plan_of(*settings) if select == "none" else search_plan(select, *settings)
    steps = {phase.name: phase.num_steps for phase in plan.phases}
    record = json.loads(json.dumps(plan.describe(steps, spent=plan.epsilon())))
    charges = [
        Charge(entry["sampling_probability"], entry["effective_noise_multiplier"], entry["num_steps"])
        for entry in record["phases"]
    ]
    assert accounting.epsilon(charges, record["delta"], record["accountant"]) == record["epsilon"]
    releases = [(charge.sampling_probability, charge.noise_multiplier, charge.num_steps) for charge in charges]
    independent = composed(releases, record["delta"])
    assert independent * (1 - 1e-6) <= record["epsilon"] <= independent * (1 + 1e-3)


def test_a_record_names_unit_relation_and_everything_a_price_depends_on() -> None:
    plan = plan_of("privacy.clipping=automatic", "privacy.clip_norm=0.3")
    record = plan.describe({PROTOTYPE: 1, FINETUNE: 8}, spent=1.25)
    finetune = plan[FINETUNE]
    assert record["epsilon"] == 1.25
    assert (record["unit"], record["relation"], record["accountant"]) == ("record", "add/remove", "pld")
    assert (record["delta"], record["num_steps"]) == (1e-5, 8)
    assert record["sampling_probability"] == 50 / N
    assert record["noise_multiplier"] == record["effective_noise_multiplier"] == finetune.mechanism.noise_multiplier
    assert (record["mechanism"], record["clipping"], record["clip_norm"]) == ("gaussian", "automatic", 0.3)
    assert [(entry["name"], entry["num_steps"]) for entry in record["phases"]] == [(PROTOTYPE, 1), (FINETUNE, 8)]
    assert plan.describe({}, spent=0.0)["num_steps"] == 0
