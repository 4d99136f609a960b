"""Private accuracy is a phase like any other: split off, noised, charged, and of no harm to the run where it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from scipy.stats import chi2

from fedlora.config import RunConfig
from fedlora.errors import BudgetRefused, ConfigError, PolicyRefused, ProtocolError, RunInterrupted
from fedlora.experiments.progress import print_result
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import resume, run_server, simulate
from fedlora.federation import cohort
from fedlora.federation.cohort import Cohort
from fedlora.federation.messages import ClientFailure, RoundInstruction
from fedlora.federation.server import Reply
from fedlora.federation.sites import TrainingData, make_site
from fedlora.federation.wire import decode_instruction, decode_update, encode_instruction, encode_update
from fedlora.models import locate_model
from fedlora.privacy.accounting import Charge
from fedlora.privacy.phases import EVALUATION, FINETUNE
from fedlora.privacy.plan import make_plan
from fedlora.privacy.policy import SitePolicy
from fedlora.randomness import SecretRoot

ON = ("federation.private_evaluation=true", "data.heldout_share=0.3", "federation.rounds=2")
CLEAR = "privacy.evaluation_noise_multiplier=0.5"
"""So little noise that the few records of these tests can be measured."""
CHEAP = ("privacy.accountant=rdp", "privacy.epsilon=40")
EVERYONE = (0, 1, 2)


def run(federation: Any, transport: Any = None) -> tuple[Any, list[Any]]:
    reports: list[Any] = []
    state = federation.server(transport, lambda report, _: reports.append(report)).run(federation.start())
    return state, reports


# -------------------------------------------------------------------------------------------------------------- split


def test_a_record_moves_one_count_by_one_if_it_is_held_out_and_none_if_not(make_federation: Any) -> None:
    federation = make_federation(*ON, *CHEAP)
    config, data, schedule = federation.config, federation.data, federation.workbench.schedule
    instruction = federation.instruction(schedule[-1], theta=federation.start().theta + 0.1)
    (whole,), own = counts(federation, [federation.sites[0]], instruction), data.parts[0]
    assert whole.sum() == len(federation.sites[0].heldout) > 10
    for record in own[:40]:
        fewer = TrainingData(records=data.records, parts={0: own[own != record]})
        site = make_site(config, fewer, schedule, 0)
        (rest,) = counts(federation, [site], instruction)
        held_out = record in federation.sites[0].heldout
        assert sorted((whole - rest).tolist()) == ([0.0] * 3 + [1.0] if held_out else [0.0] * 4)
        assert len(federation.sites[0].records) - len(site.records) == (not held_out)


def counts(federation: Any, sites: list[Any], instruction: RoundInstruction) -> list[torch.Tensor]:
    cohort = Cohort(workbench=federation.workbench, dataset=federation.dataset, sites=sites, ledger=federation.ledger)
    return [cohort._confusion_counts(instruction.theta, site, site.schedule[-1]) for site in sites]


@pytest.mark.parametrize("head", ["prototype", "trained"])
def test_training_never_sees_what_is_held_out(make_federation: Any, head: str) -> None:
    plain, changed = (make_federation(*ON, f"model.head={head}") for _ in range(2))
    for site in changed.sites:
        assert not set(site.heldout) & set(site.records)
        assert sorted([*site.heldout, *site.records]) == changed.data.parts[site.client].tolist()
        changed.dataset.labels[site.heldout] = 1 - changed.dataset.labels[site.heldout]
    (one, before), (other, after) = run(plain), run(changed)
    assert torch.equal(one.theta, other.theta)
    assert before[-1].private_evaluation != after[-1].private_evaluation


def test_without_an_evaluation_everything_is_trained_on(make_federation: Any) -> None:
    for site in make_federation("data.heldout_share=0.9").sites:
        assert (len(site.records), len(site.heldout)) == (80, 0)


def test_nothing_public_depends_on_how_many_records_are_held_out(make_federation: Any) -> None:
    """Sampling, divisor, noise and every fact are those of n; only the noised counts are of the held-out records."""
    some, many, none = (
        make_federation(*ON, f"data.heldout_share={share}") for share in ("0.1", "0.7", "0.0000000000001")
    )
    assert len({len(f.sites[0].heldout) for f in (some, many, none)}) == 3
    for federation in (many, none):
        for site, other in zip(federation.sites, some.sites, strict=True):
            assert site.plan == other.plan
            assert site.plan[FINETUNE].sampler.sampling_probability == 16 / 80
            assert [site.facts(entry) for entry in site.schedule] == [other.facts(entry) for entry in other.schedule]
            assert site.facts(site.schedule[0])["num_examples"] == 80
            assert "records" not in repr(site)
            assert "heldout" not in repr(site)
        _, reports = run(federation)
        assert reports[-1].clients_ok == 3, "a site without any held-out record sends noise"


# -------------------------------------------------------------------------------------------------------------- price


@pytest.mark.parametrize("head", ["prototype", "frozen"])
def test_the_plans_epsilon_has_the_evaluation_in_it(head: str) -> None:
    """Against dp-accounting itself; without the evaluation it would be far off."""
    config = RunConfig().with_overrides(
        "federation.private_evaluation=true", "federation.rounds=5", f"model.head={head}", "privacy.epsilon=1",
        "privacy.evaluation_noise_multiplier=6",
    )  # fmt: skip
    plan = make_plan(config, num_examples=2000, num_steps={FINETUNE: 5 * config.federation.local_steps}, client=0)
    assert [phase.name for phase in plan.phases][-2:] == [FINETUNE, EVALUATION]
    assert plan[EVALUATION].charge() == Charge(1.0, 6.0, 1)
    assert plan[EVALUATION].sensitivity == 1.0
    sigma = plan[FINETUNE].mechanism.noise_multiplier
    step = dp_accounting.PoissonSampledDpEvent(128 / 2000, dp_accounting.GaussianDpEvent(sigma))
    events = [dp_accounting.SelfComposedDpEvent(step, 50)]
    events += [dp_accounting.GaussianDpEvent(20.0)] * (head == "prototype")
    trained = golden(events)
    assert plan.epsilon() == pytest.approx(golden([*events, dp_accounting.GaussianDpEvent(6.0)]), rel=2e-3)
    assert 0.99 <= plan.epsilon() <= 1.0
    assert trained < 0.9


def golden(events: list[Any]) -> float:
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in events:
        accountant.compose(event)
    return float(accountant.get_epsilon(1e-5))


def test_an_evaluation_that_costs_more_than_everything_is_refused() -> None:
    config = RunConfig().with_overrides(*ON, "privacy.epsilon=1", "privacy.evaluation_noise_multiplier=1")
    with pytest.raises(BudgetRefused, match=r"privacy\.evaluation_noise_multiplier"):
        make_plan(config, num_examples=2000, num_steps={FINETUNE: 2 * config.federation.local_steps}, client=0)


def test_it_is_charged_before_a_record_is_looked_at(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = make_federation(*ON, "privacy.seeded_noise=false")
    charged: list[list[str]] = []

    def spy(*_: Any) -> Any:
        charged.append([entry.purpose for entry in federation.ledger.entries() if entry.kind == "reserved"])
        return torch.zeros(4, dtype=torch.float64)

    monkeypatch.setattr(cohort, "confusion_counts", spy)
    run(federation)
    assert charged == [[FINETUNE] * 6 + [EVALUATION] * 3] * 3
    for site in federation.sites:
        assert Charge(1.0, 10.0, 1) in federation.ledger.charges(site.data_set)


def test_the_noise_of_a_release_is_that_of_its_multiplier(make_federation: Any) -> None:
    """Sum of squares over the variance is chi-square: false alarms 1e-6; 0.9 σ and 1.1 σ are rejected."""
    federation = make_federation(*ON, "data.task=mnli")
    entry, layout, noise = federation.workbench.schedule[-1], federation.workbench.payload_layout(EVALUATION), []
    assert ([slot.name for slot in layout.slots], layout.size) == (["evaluation/confusion"], 9)
    for site in federation.sites:
        site.heldout = site.heldout[:1]
    exact = counts(federation, federation.sites, federation.instruction(entry))
    for repetition in range(250):
        for site in federation.sites:
            site.secret, site.next_round = SecretRoot.seeded(repetition), 0
        federation.ledger.abandon("run-1", from_round=0)
        updates = federation.exchange(federation.instruction(entry), EVERYONE)
        noise += [update.vector - total for update, total in zip(updates, exact, strict=True)]
    values = torch.stack(noise).double()
    low, high = chi2.ppf(5e-7, values.numel()), chi2.isf(5e-7, values.numel())
    for scale, fits in ((1.0, True), (0.9, False), (1.1, False)):
        assert (low < float(values.square().sum()) / (scale * 10.0) ** 2 < high) == fits


# --------------------------------------------------------------------------------------------------------- round loop


class Wired:
    """Every client in a cohort of its own, and everything as bytes in between, as over a network."""

    def __init__(self, federation: Any) -> None:
        self.federation = federation

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        arrived = decode_instruction(encode_instruction(instruction))
        updates = [self.federation.exchange(arrived, (client,))[0] for client in reversed(clients)]
        return [decode_update(encode_update(update)) for update in updates]


@pytest.mark.parametrize("head", ["prototype", "frozen", "trained"])
def test_the_server_adds_up_the_noised_counts_whatever_the_transport(make_federation: Any, head: str) -> None:
    fused, wired = (make_federation(*ON, CLEAR, *CHEAP, f"model.head={head}") for _ in range(2))
    (state, reports), (_, over_wire) = run(fused), run(wired, Wired(wired))
    found = reports[-1].private_evaluation
    assert found == over_wire[-1].private_evaluation
    assert (reports[-1].phase, reports[-1].metric, found.clients, found.num_cells) == (EVALUATION, None, 3, 4)
    assert found.noise_std == pytest.approx(0.5 * 3**0.5)
    exact = sum(counts(fused, fused.sites, fused.instruction(fused.workbench.schedule[-1], state)))
    noise = np.array(found.confusion).ravel() - exact.numpy()
    assert 0 < np.abs(noise).max() < 5 * found.noise_std
    assert found.accuracy == pytest.approx(np.trace(found.confusion) / np.sum(found.confusion))
    assert abs(found.accuracy - float(exact[[0, 3]].sum() / exact.sum())) < 5 * found.standard_error
    assert [report.private_evaluation for report in reports[:-1]] == [None] * (len(reports) - 1)
    assert reports[-2].metric is not None, "public metrics come after the last round of fine-tuning"


def test_the_error_is_made_of_the_noise_that_is_added_where_the_grid_widens_it(make_federation: Any) -> None:
    """A confident accuracy out of noise alone was the result of σ·C, which is less than what a coarse grid needs."""
    loud = "privacy.evaluation_noise_multiplier=1e6"
    _, reports = run(make_federation(*ON, *CHEAP, loud))
    found = reports[-1].private_evaluation
    assert found.noise_std == pytest.approx(1e6 * 3**0.5 * 1.0625)
    assert found.note.startswith("not measurable: noise")


@pytest.mark.parametrize("key", ["evaluation_noise_multiplier", "prototype_noise_multiplier"])
def test_noise_that_nothing_shows_through_is_refused(key: str) -> None:
    for value in ("1000001", "1e9", "1e300"):
        with pytest.raises(ConfigError, match=rf"privacy\.{key} = .*, wanted > 0 and <= 1000000"):
            RunConfig().with_overrides(f"privacy.{key}={value}")


def test_the_adapter_is_that_of_the_last_fine_tuning_round(make_federation: Any) -> None:
    federation = make_federation(*ON)
    seen = []
    server = federation.server(None, lambda report, state: seen.append(state.theta.clone()))
    assert torch.equal(server.run(federation.start()).theta, seen[1])
    assert len(seen) == 3


def test_a_silent_client_is_left_out_of_the_sum_and_charged(make_federation: Any) -> None:
    federation, whole = make_federation(*ON, CLEAR, *CHEAP), make_federation(*ON, CLEAR, *CHEAP)

    class Silent:
        def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
            replies = federation.exchange(instruction, clients)
            return [reply for reply in replies if reply.client != 1 or instruction.phase != EVALUATION]

    (state, reports), (known, _) = run(federation, Silent()), run(whole)
    found = reports[-1].private_evaluation
    assert (found.clients, reports[-1].clients_failed, dict(reports[-1].failures)) == (2, 1, {1: "no_reply"})
    assert found.noise_std == pytest.approx(0.5 * 2**0.5)
    assert [phase["num_steps"] for phase in state.facts[1]["phases"]] == [4, 1]
    assert state.facts[1]["epsilon"] == pytest.approx(known.facts[1]["epsilon"], rel=1e-3)


@pytest.mark.parametrize("how", ["silent", "refused"])
def test_an_evaluation_that_fails_leaves_the_trained_run_as_it_is(
    make_federation: Any, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    federation, whole = make_federation(*ON), make_federation(*ON)

    class Failing:
        def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
            if instruction.phase != EVALUATION:
                return federation.exchange(instruction, clients)  # type: ignore[no-any-return]
            if how == "refused":
                raise BudgetRefused("the data set's budget does not suffice")
            return [ClientFailure(0, "internal")]

    (state, reports), (known, _) = run(federation, Failing()), run(whole)
    assert torch.equal(state.theta, known.theta)
    assert (reports[-1].clients_ok, reports[-1].clients_failed) == (0, 3)
    assert reports[-1].private_evaluation.note == "not measurable: no client's answer arrived"
    assert ("budget does not suffice" in caplog.text) == (how == "refused")
    assert state.next_round == 3
    assert state.facts[0]["epsilon"] == pytest.approx(known.facts[0]["epsilon"], rel=1e-3), "charged all the same"


@pytest.mark.parametrize("value", [11.0, -11.0, float("nan")])
def test_a_hostile_theta_is_not_evaluated(make_federation: Any, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    federation = make_federation(*ON)
    monkeypatch.setattr(cohort, "confusion_counts", lambda *_: pytest.fail("counted"))
    entry = federation.workbench.schedule[-1]
    hostile = federation.instruction(entry, theta=torch.full((federation.workbench.layout.size,), value))
    with pytest.raises(ProtocolError):
        federation.exchange(hostile, EVERYONE)
    assert [site.next_round for site in federation.sites] == [0, 0, 0]
    assert federation.ledger.entries() == []


# --------------------------------------------------------------------------------------------------------- whole runs


class Watching:
    """Interrupts after the round of index `at`."""

    def __init__(self, at: int = -1) -> None:
        self.at = at

    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...

    def round(self, report: Any) -> None:
        if report.round == self.at:
            raise KeyboardInterrupt

    def finish(self, record: Any) -> None: ...


@pytest.fixture
def make_run(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda *overrides, out: tiny_config(*ON, CLEAR, *CHEAP, *overrides, f"run.out='{tmp_path / out}'")


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return record


@pytest.mark.parametrize("at", [1, 2], ids=["before the evaluation", "before the record"])
def test_an_interrupted_run_goes_on_to_the_same_evaluation(make_run: Callable[..., RunConfig], at: int) -> None:
    whole, cut = make_run(out="whole"), make_run(out="cut")
    with pytest.raises(RunInterrupted):
        simulate(cut, Watching(at))
    found = record_of(resume(Path(cut.run.out), Watching()))
    wanted = record_of(simulate(whole, Watching()))
    for key in ("private_evaluation", "metric", "clients", "bytes_up"):
        assert found[key] == wanted[key]
    assert found["metrics"] == RunFolder(Path(cut.run.out)).read_rounds()[1]["metrics"]


def test_an_evaluation_that_was_asked_for_and_lost_is_asked_for_again(make_federation: Any, tmp_path: Path) -> None:
    federation = make_federation(*ON, *CHEAP, "privacy.seeded_noise=false", f"run.out='{tmp_path / 'run'}'")
    folder, lost = RunFolder.create(federation.config), []

    class Cut:
        def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
            if instruction.phase == EVALUATION and not lost:
                lost.append(instruction)
                raise KeyboardInterrupt
            return federation.exchange(instruction, clients)  # type: ignore[no-any-return]

    with pytest.raises(RunInterrupted):
        run_server(federation.config, folder, federation.workbench, Cut(), (), Watching())
    run_server(federation.config, folder, federation.workbench, Cut(), (), Watching())
    record = record_of(folder.path)
    assert record["private_evaluation"]["clients"] == 3
    assert [[phase["num_steps"] for phase in facts["phases"]] for facts in record["clients"]] == [[4, 1]] * 3


def test_the_result_has_the_accuracy_with_its_error(
    make_run: Callable[..., RunConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = simulate(make_run("privacy.seeded_noise=false", out="run"), Watching())
    found = record_of(folder)["private_evaluation"]
    print_result(folder)
    assert (
        f"private accuracy  {found['accuracy']:.4f} ± {found['standard_error']:.4f} on held-out records of 3 clients, "
        "from counts with noise of standard deviation 0.866\n"
    ) in capfd.readouterr().out


def test_a_result_that_noise_hides_is_said_to_be_none(
    make_run: Callable[..., RunConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    print_result(simulate(make_run("privacy.evaluation_noise_multiplier=1000", out="run"), Watching()))
    assert "private accuracy  not measurable: noise σ·C·√clients = 3464.3 on" in capfd.readouterr().out
    print_result(simulate(make_run("federation.private_evaluation=false", out="without"), Watching()))
    assert "private accuracy" not in capfd.readouterr().out


def test_a_policy_that_does_not_allow_the_phase_refuses_the_whole_run(
    make_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_run("privacy.seeded_noise=false", out="run")
    base = f'"{config.model.name}" = "{locate_model(config.model.name).digest}"'
    limits = "[limits]\nsmallest_noise_multiplier = 0.1\n"
    data = '[data.all]\ntask = "sst2"\nsource = "generated"\nmax_epsilon = 50.0\nmax_delta = 1e-3\n'
    file = tmp_path / "site.toml"
    file.write_text(f"[models]\n{base}\n{limits}{data}")
    with pytest.raises(PolicyRefused, match='phase = "evaluation", the policy allows prototype, finetune') as refused:
        simulate(config, Watching(), SitePolicy.from_toml(file))
    assert refused.value.rule == "phases"
    assert not Path(config.run.out).exists()
    assert not (tmp_path / "ledger.sqlite").exists(), "nothing was charged"
    file.write_text(f'[models]\n{base}\n{limits}{data}[allow]\nphases = ["prototype", "finetune", "evaluation"]\n')
    folder = simulate(config, Watching(), SitePolicy.from_toml(file))
    assert record_of(folder)["private_evaluation"]["clients"] == 3
