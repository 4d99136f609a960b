"""What a site's owner allows is all that happens: every rule refuses, stricter passes, the budget outlives a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fedlora.config import RunConfig
from fedlora.errors import PolicyRefused
from fedlora.experiments import simulate as experiment
from fedlora.experiments.run_folder import RunFolder
from fedlora.federation import shelf, sites
from fedlora.models import locate_model
from fedlora.privacy.client_level import ServerNoise
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.plan import PrivacyPlan, make_plan
from fedlora.privacy.policy import SitePolicy
from tests.command_line import Said, typed
from tests.numbers import tells

ROOT = Path(__file__).resolve().parents[2]
RECORDS = 211  # a number that occurs nowhere else


@dataclass(frozen=True)
class Hospital:
    """One site: a folder of records, a policy, and whoever asks it for runs."""

    folder: Path
    config: RunConfig
    command: Callable[..., Said]

    @property
    def policy(self) -> Path:
        return self.folder / "site.toml"

    @property
    def runs(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("run*"))

    def write_policy(self, *changes: tuple[str, str], name: str = "ward") -> SitePolicy:
        """The policy that just allows `config`, with `changes` made to its text."""
        model = self.config.model.name
        text = f"""
[site]
ledger = "books/ledger.sqlite"
[limits]
smallest_noise_multiplier = 0.3
largest_clip_norm = 1.0
most_steps_per_round = 2
most_rounds = 2
most_clients = 1
largest_rank = 4
longest_input = 16
[allow]
phases = ["prototype", "finetune"]
[models]
"{model}" = "{locate_model(model).digest}"
[data.{name}]
task = "sst2"
source = "records"
max_epsilon = 7.0
max_delta = 1e-3
"""
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        self.policy.write_text(text)
        return SitePolicy.from_toml(self.policy)

    def write_records(self, count: int = RECORDS, *, first: str = "a good film") -> None:
        (self.folder / "records").mkdir(exist_ok=True)
        for split, size in (("train", count), ("validation", 40)):
            texts = [first, *(f"the plot was {'very ' * (number % 7)}good" for number in range(size - 1))]
            table = pyarrow.table({"sentence": texts, "label": [number % 2 for number in range(size)]})
            pyarrow.parquet.write_table(table, self.folder / "records" / f"{split}.parquet")

    def ask(self, *overrides: str, out: str = "run") -> Said:
        recipe = self.folder / "recipe.toml"
        recipe.write_text(self.config.to_toml())
        settings = [part for override in overrides for part in ("--set", override)]
        return self.command("simulate", recipe, *settings, "--policy", self.policy, "--out", self.folder / out)

    def charged(self) -> int:
        with_ledger = self.folder / "books" / "ledger.sqlite"
        return len(Ledger.open(with_ledger).entries()) if with_ledger.exists() else 0


class Silent:
    def start(self, *_: Any, **__: Any) -> None: ...

    def round(self, report: Any) -> None: ...

    def finish(self, record: Any) -> None: ...


@pytest.fixture
def hospital(
    tiny_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Hospital:
    """One site that allows just what its config asks for; whoever asks stands in another folder."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "books").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def command(*arguments: object) -> Said:
        return typed(arguments, monkeypatch, capfd)

    options = ["federation.clients=1", "federation.rounds=2", "model.head=prototype"]
    config = tiny_config(*options, "privacy.seeded_noise=false", "data.source='/nowhere/at/all'")
    made = Hospital(tmp_path, config, command)
    made.write_records()
    return made


def refused(said: Said, code: int = 3) -> str:
    assert (said.code, said.out) == (code, ""), said
    assert re.fullmatch(r"fedlora: [^\n]+\n", said.err), said.err
    return said.err


@pytest.fixture
def nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a record nor a model nor the hub."""
    for module, name in ((shelf, "load_records"), (sites, "locate_model")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("touched although the run is refused"))
    monkeypatch.setattr(experiment, "build_workbench", lambda *_: pytest.fail("a model was built"))


# --------------------------------------------------------------------------------------------------------------- rules

RULES: dict[str, tuple[tuple[str, ...], str]] = {
    "a looser epsilon": (("privacy.epsilon=7.1",), "data.max_epsilon"),
    "no privacy": (("privacy.epsilon=inf",), "data.max_epsilon"),
    "clients in place of records": (("privacy.unit=client", "model.head=frozen"), "units"),
    "a looser delta": (("privacy.delta=1.1e-3",), "data.max_delta"),
    "more clipped norm": (("privacy.clip_norm=1.01",), "limits.largest_clip_norm"),
    "more steps": (("federation.local_steps=3",), "limits.most_steps_per_round"),
    "more rounds": (("federation.rounds=3",), "limits.most_rounds"),
    "endless rounds": (("federation.rounds=1_000_000_000",), "limits.most_rounds"),
    "more clients": (("federation.clients=2",), "limits.most_clients"),
    "endless clients": (("federation.clients=1_000_000_000",), "limits.most_clients"),
    "a larger rank": (("adapter.rank=5",), "limits.largest_rank"),
    "longer inputs": (("data.max_length=17",), "limits.longest_input"),
    "another mechanism": (("privacy.mechanism=gredp",), "mechanisms"),
    "device noise": (("engine.noise=device",), "noise"),
    "another model": (("model.name=bert-base-uncased",), "models"),
    "another task": (("data.task=cola",), "data"),
    "seeded noise": (("privacy.seeded_noise=true",), "sound"),
    "an evaluation": (("federation.private_evaluation=true",), "phases"),
    "a search": (("adapter.select=alignment", "adapter.warmup_rounds=1"), "phases"),
}


@pytest.mark.parametrize("case", RULES)
def test_every_rule_refuses_before_anything_is_touched(hospital: Hospital, nothing_is_touched: None, case: str) -> None:
    overrides, rule = RULES[case]
    policy = hospital.write_policy()
    with pytest.raises(PolicyRefused) as caught:
        policy.check_config(hospital.config.with_overrides(*overrides))
    assert caught.value.rule == rule
    refused(hospital.ask(*overrides))
    assert (hospital.runs, hospital.charged()) == ([], 0)


def test_noise_without_effect_is_refused_even_where_its_mechanism_is_allowed(
    hospital: Hospital, nothing_is_touched: None
) -> None:
    hospital.write_policy(("[allow]", '[allow]\nmechanisms = ["gaussian", "gredp"]'))
    unsound = ("privacy.mechanism=gredp", "privacy.gredp_noise=real", "privacy.allow_unsound=true")
    assert "protects nothing" in refused(hospital.ask(*unsound))
    assert (hospital.runs, hospital.charged()) == ([], 0)


@pytest.mark.parametrize("missing", ["warmup", "alignment", "bilevel"])
def test_each_phase_of_a_search_is_allowed_by_its_own_name(
    hospital: Hospital, nothing_is_touched: None, missing: str
) -> None:
    allowed = [name for name in ("prototype", "finetune", "warmup", "alignment", "bilevel") if name != missing]
    policy = hospital.write_policy(
        ('["prototype", "finetune"]', json.dumps(allowed)), ("most_rounds = 2", "most_rounds = 3")
    )
    searches = {"warmup": "warmup", "alignment": "warmup, alignment", "bilevel": "warmup, bilevel"}
    for method, phases in searches.items():
        warmup = 2 if method == "warmup" else 1
        overrides = (f"adapter.select={method}", f"adapter.warmup_rounds={warmup}", "adapter.search_rounds=1")
        config = hospital.config.with_overrides(*overrides, "federation.rounds=3")
        if missing not in phases:
            policy.check_config(config)
            continue
        with pytest.raises(PolicyRefused, match=f'phase = "{missing}"') as caught:
            policy.check_config(config)
        assert caught.value.rule == "phases"
        assert f'phase = "{missing}"' in refused(hospital.ask(*overrides, "federation.rounds=3"))
    assert (hospital.runs, hospital.charged()) == ([], 0)


@pytest.mark.parametrize("select", ["all", "random", "probe"])
def test_a_choice_without_a_record_needs_no_phase(hospital: Hospital, select: str) -> None:
    hospital.write_policy().check_config(hospital.config.with_overrides(f"adapter.select={select}"))


def test_gates_need_noise_like_the_weights_beside_them(hospital: Hospital) -> None:
    """A plan refuses gates with less noise by itself; the policy does not take its word for it."""
    policy = hospital.write_policy(('["prototype", "finetune"]', '["prototype", "finetune", "warmup", "bilevel"]'))
    search = ("adapter.select=bilevel", "adapter.warmup_rounds=1", "adapter.search_rounds=1", "federation.rounds=3")
    steps = {"prototype": 1, "warmup": 2, "bilevel": 2, "finetune": 2}
    plan = make_plan(hospital.config.with_overrides(*search), num_examples=RECORDS, num_steps=steps, client=0)
    policy.check_plan(plan)
    gates = plan["bilevel"].beside
    assert gates is not None
    object.__setattr__(gates, "mechanism", GaussianMechanism(0.29))
    with pytest.raises(PolicyRefused, match=r"phase gates has noise multiplier 0\.29") as caught:
        policy.check_plan(plan)
    assert caught.value.rule == "limits.smallest_noise_multiplier"


def test_who_allows_clients_as_the_unit_is_still_owed_the_noise_that_the_federation_adds(hospital: Hospital) -> None:
    """Of its own it adds none, or little: the limit is held against what is charged for the sum."""
    policy = hospital.write_policy(("[allow]", '[allow]\nunits = ["record", "client"]'))
    client = ("privacy.unit=client", "model.head=frozen", "federation.local_steps=2")
    asked = hospital.config.with_overrides(*client)
    policy.check_config(asked)
    policy.check_config(hospital.config)
    loose = asked.with_overrides("privacy.epsilon=1e6")

    def plan(noise_multiplier: float) -> PrivacyPlan:
        how = ServerNoise(clip_norm=1.0, noise_multiplier=noise_multiplier, cohort_size=1, steps_per_round=2)
        return make_plan(loose, num_examples=RECORDS, num_steps={"finetune": 4}, client=0, client_level=how)

    policy.check_plan(plan(0.3))
    with pytest.raises(PolicyRefused, match="phase finetune has noise multiplier") as caught:
        policy.check_plan(plan(0.299))
    assert caught.value.rule == "limits.smallest_noise_multiplier"


def test_the_policy_knows_the_phases_of_a_plan(hospital: Hospital) -> None:
    from fedlora.privacy import plan

    names = [plan.PROTOTYPE, plan.WARMUP, plan.ALIGNMENT, plan.BILEVEL, plan.FINETUNE, plan.EVALUATION]
    policy = hospital.write_policy(('["prototype", "finetune"]', json.dumps(names)))
    assert policy.allow.phases == tuple(names)


def test_prototypes_can_be_forbidden(hospital: Hospital, nothing_is_touched: None) -> None:
    hospital.write_policy(('["prototype", "finetune"]', '["finetune"]'))
    assert 'phase = "prototype", the policy allows finetune' in refused(hospital.ask())


def test_other_weights_are_refused_before_a_record_is_read_and_the_refusal_has_both_digests(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "load_records", lambda *_, **__: pytest.fail("records were read"))
    digest = locate_model(hospital.config.model.name).digest
    hospital.write_policy((digest, "0" * 64))
    message = refused(hospital.ask())
    assert digest in message, "so that the owner can allow it"
    assert "0" * 64 in message
    assert (hospital.runs, hospital.charged()) == ([], 0)


@pytest.mark.parametrize(("phase", "least"), [("finetune", 1.0), ("prototype", 2.0)])
def test_too_little_noise_in_any_phase_is_refused(hospital: Hospital, phase: str, least: float) -> None:
    """Calibrated to ε = 6, or to what the prototypes leave of it, fine-tuning has a σ below 1 and above 0.3."""
    noise = {"finetune": 20.0, "prototype": 1.5}[phase]
    policy = hospital.write_policy(("smallest_noise_multiplier = 0.3", f"smallest_noise_multiplier = {least}"))
    overrides = [f"privacy.prototype_noise_multiplier={noise}"]
    with pytest.raises(PolicyRefused, match=f"phase {phase} has noise multiplier") as caught:
        experiment.simulate(hospital.config.with_overrides(*overrides), Silent(), policy)
    assert caught.value.rule == "limits.smallest_noise_multiplier"
    refused(hospital.ask(*overrides))
    assert (hospital.runs, hospital.charged()) == ([], 0)


STRICTER = ["privacy.epsilon=5", "privacy.delta=1e-5", "privacy.clip_norm=0.5", "federation.local_steps=1"]
STRICTER += ["federation.rounds=1", "adapter.rank=2", "data.max_length=8", "model.head=frozen"]


def test_what_is_asked_just_as_allowed_or_stricter_is_done(hospital: Hospital) -> None:
    hospital.write_policy()
    for number, overrides in enumerate([(), *((override,) for override in STRICTER), tuple(STRICTER)]):
        (hospital.folder / "books" / "ledger.sqlite").unlink(missing_ok=True)
        said = hospital.ask(*overrides, out=f"run{number}")
        assert said.code == 0, said
        assert hospital.charged() > 0


def test_the_site_decides_where_its_records_lie_and_what_it_computes_on(hospital: Hospital) -> None:
    policy = hospital.write_policy(("[limits]", 'device = "cpu"\ntoken_budget = 64\n[limits]'))
    asked = hospital.config.with_overrides("run.device='cuda:7'", "engine.token_budget=1_000_000_000_000")
    config = policy.localised(asked)
    assert Path(config.data.source) == hospital.folder / "records", "relative to the policy, not to whoever asks"
    assert (config.run.device, config.engine.token_budget) == ("cpu", 64)
    assert policy.ledger == hospital.folder / "books" / "ledger.sqlite"
    assert policy.localised(config) == config


@pytest.mark.parametrize(
    ("change", "blamed"),
    [
        (("[limits]", 'device = "cuda:77"\n[limits]'), "site.device = cuda:77 in the policy {}"),
        (('source = "records"', 'source = "record"'), "data.ward.source = record in the policy {}"),
        (("max_epsilon", "public_size = 15\nmax_epsilon"), "The policy {} sets this number: public_size = 15"),
    ],
)
def test_what_the_policy_sets_wrong_is_not_blamed_on_the_run(
    hospital: Hospital, change: tuple[str, str], blamed: str
) -> None:
    hospital.write_policy(change)
    message = refused(hospital.ask(), code=2)
    assert blamed.format(hospital.policy) in message
    assert "run.device" not in message
    assert "data.source" not in message
    assert (hospital.runs, hospital.charged()) == ([], 0)


# ------------------------------------------------------------------------------------------------------ broken policies

BROKEN: dict[str, tuple[tuple[str, str], str]] = {
    "unknown section": (("[limits]", "[limit]"), "did you mean"),
    "unknown key": (("most_rounds", "most_round"), "did you mean limits.most_rounds?"),
    "unknown key of a data set": (("max_epsilon", "max_epsilom"), "max_epsilon?"),
    "missing key": (("max_delta = 1e-3\n", ""), "max_delta"),
    "wrong type": (("max_epsilon = 7.0", 'max_epsilon = "8"'), "wanted a number"),
    "truth for a number": (("largest_rank = 4", "largest_rank = true"), "wanted a whole number"),
    "out of range": (("max_delta = 1e-3", "max_delta = 0.6"), "<= 0.5"),
    "negative": (("smallest_noise_multiplier = 0.3", "smallest_noise_multiplier = -1.0"), "> 0"),
    "no number": (("max_epsilon = 7.0", "max_epsilon = nan"), "nan"),
    "infinite": (("max_epsilon = 7.0", "max_epsilon = inf"), "finite"),
    "unknown task": (('task = "sst2"', 'task = "sst3"'), "did you mean sst2?"),
    "size of zero": (("max_epsilon", "public_size = 0\nmax_epsilon"), "public_size"),
    "size as text": (("max_epsilon", 'public_size = "about 200"\nmax_epsilon'), "public_size"),
    "a data set that is none": (("[data.ward]", "[data]"), "wanted a table"),
    "no data set": (("[data.ward]", "[site.ward]"), ""),
    "an unknown unit": (('phases = ["prototype", "finetune"]', 'units = ["clients"]'), "did you mean client?"),
    "an unknown phase": (('["prototype", "finetune"]', '["prototype", "finetun"]'), "did you mean finetune?"),
    "phases as a number": (('phases = ["prototype", "finetune"]', "phases = 3"), "list of names"),
    "no phases": (('phases = ["prototype", "finetune"]', "phases = []"), "non-empty"),
    "a section as a value": (("[site]\n", "allow = 3\n[site]\n"), ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_policy_refuses_everything(hospital: Hospital, nothing_is_touched: None, case: str) -> None:
    change, hint = BROKEN[case]
    with pytest.raises(PolicyRefused) as caught:
        hospital.write_policy(change)
    assert caught.value.rule == "policy"
    assert hint in str(caught.value)
    assert "nothing runs" in refused(hospital.ask())
    assert (hospital.runs, hospital.charged()) == ([], 0)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "a folder",
        b"",
        b"[site",
        b"\xff\xfe[\x00s\x00",
        b'[models]\n"m" = "%s"\n' % (b"A" * 64),
        b"[models]\nm = 3",
    ],
    ids=["missing", "a folder", "empty", "no TOML", "UTF-16", "digest in capitals", "digest is no text"],
)
def test_what_is_no_policy_refuses_everything(
    hospital: Hospital, nothing_is_touched: None, content: bytes | str | None
) -> None:
    if isinstance(content, bytes):
        hospital.policy.write_bytes(content)
    elif content:
        hospital.policy.mkdir()
    refused(hospital.ask())
    with pytest.raises(PolicyRefused) as caught:
        SitePolicy.from_toml(hospital.policy)
    assert caught.value.rule == "policy"
    assert (hospital.runs, hospital.charged()) == ([], 0)


def test_two_data_sets_for_one_task_leave_no_choice(hospital: Hospital, nothing_is_touched: None) -> None:
    policy = hospital.write_policy(
        ("[data.ward]", '[data.other]\ntask = "sst2"\nsource = "x"\nmax_epsilon = 1\nmax_delta = 1e-9\n[data.ward]')
    )
    with pytest.raises(PolicyRefused, match="2 data sets for task sst2") as caught:
        policy.data_set("sst2")
    assert caught.value.rule == "data"
    refused(hospital.ask())


def test_policies_that_allow_the_same_are_equal_and_an_edit_shows(hospital: Hospital) -> None:
    one, same = hospital.write_policy(), hospital.write_policy()
    assert one == same
    assert hash(one) == hash(same)
    assert hospital.write_policy(("max_epsilon = 7.0", "max_epsilon = 6.5")) != one
    assert hospital.write_policy((locate_model(hospital.config.model.name).digest, "0" * 64)) != one


def test_the_documented_policy_is_one_with_the_values_it_claims() -> None:
    from fedlora.privacy.policy import Allow, Limits, SiteSection

    policy = SitePolicy.from_toml(ROOT / "docs" / "site.toml")
    assert (policy.site, policy.limits, policy.allow) == (SiteSection(), Limits(), Allow())
    assert policy.data_set("sst2")[1].public_size == "exact"
    policy.check_config(RunConfig())


# ------------------------------------------------------------------------------------------------ the number of records


@pytest.mark.parametrize("declared", [150, 400])
def test_a_size_that_stays_is_nowhere_and_the_declared_one_decides(hospital: Hospital, declared: int) -> None:
    hospital.write_policy(("max_epsilon", f"public_size = {declared}\nmax_epsilon"))
    assert hospital.ask().code == 0
    record = json.loads((hospital.folder / "run" / "record.json").read_text())
    (facts,) = record["clients"]
    assert "num_examples" not in facts
    assert facts["sampling_probability"] == 16 / declared
    for path in (hospital.folder / "run").rglob("*"):
        if path.suffix in {".json", ".jsonl", ".toml", ".md"}:
            assert not tells(path.read_text(), RECORDS), path


@pytest.mark.parametrize("declared", [150, 400])
def test_no_refusal_tells_a_size_that_stays(hospital: Hospital, declared: int) -> None:
    """Neither in its text nor by which δ or batch it starts: those that are compared with n are the owner's own."""
    hospital.write_policy(("max_epsilon", f"public_size = {declared}\nmax_epsilon"))
    message = refused(hospital.ask(f"training.expected_batch_size={declared + 1}"), code=2)
    assert str(declared) in message
    assert not tells(message, RECORDS)
    hospital.write_policy(("max_delta = 1e-3", "max_delta = 0.005"), ("max_epsilon", "public_size = 150\nmax_epsilon"))
    for delta in ("0.0049", "0.0047", "1e-5"):  # 1/n = 0.00474
        message = refused(hospital.ask(f"privacy.delta={delta}"))
        assert "max_delta" in message
        assert not tells(message, RECORDS)
    assert (hospital.runs, hospital.charged()) == ([], 0)


# --------------------------------------------------------------------------------------------------------- the budget

SUM = r"charged so far ε = (\d\.\d+), this run alone ε = (\d\.\d+), together ε = (\d+\.\d+), above"


def test_runs_add_up_and_the_one_that_would_pass_the_cap_is_refused_with_the_sum(hospital: Hospital) -> None:
    hospital.write_policy()
    assert hospital.ask().code == 0
    before = hospital.charged()
    said = hospital.ask(out="run2")
    assert said.code == 3, said
    numbers = re.search(SUM, said.err)
    assert numbers is not None, said.err
    spent, alone, together = map(float, numbers.groups())
    assert spent == pytest.approx(6.0, rel=0.02)
    assert alone == pytest.approx(6.0, rel=0.02)
    assert together == pytest.approx(7.53, abs=0.02), "composed, not added"
    assert "Lower privacy.epsilon" in said.err
    assert hospital.charged() == before
    assert not (hospital.folder / "run2").exists()


def test_runs_that_fit_under_the_cap_together_are_both_done(hospital: Hospital) -> None:
    hospital.write_policy(("max_epsilon = 7.0", "max_epsilon = 8.0"))
    assert [hospital.ask(out=name).code for name in ("run1", "run2", "run3")] == [0, 0, 3]


def test_neither_changed_records_nor_a_new_name_nor_a_changed_policy_start_a_budget_afresh(hospital: Hospital) -> None:
    hospital.write_policy()
    assert hospital.ask().code == 0
    spent = hospital.charged()
    hospital.write_records(first="a bad film")
    assert "budget does not suffice" in hospital.ask(out="run2").err
    hospital.write_records()
    hospital.write_policy(name="clinic")
    assert "budget does not suffice" in hospital.ask(out="run3").err
    hospital.write_policy(("max_epsilon = 7.0", "max_epsilon = 6.5"))
    assert "budget does not suffice" in hospital.ask(out="run4").err
    assert hospital.charged() == spent


# ------------------------------------------------------------------------------------------------------------- resume


class Killed(BaseException):
    """Ends a run at once."""


def killed_run(hospital: Hospital, monkeypatch: pytest.MonkeyPatch, policy: SitePolicy | None) -> Path:
    def dies(_: Silent, report: Any) -> None:
        if report.round == 1:
            raise Killed

    out = hospital.folder / "run"
    source = f"data.source='{hospital.folder / 'records'}'"
    with monkeypatch.context() as patch:
        patch.setattr(Silent, "round", dies)
        with pytest.raises(Killed):
            experiment.simulate(hospital.config.with_overrides(f"run.out='{out}'", source), Silent(), policy)
    return out


def test_a_run_under_a_policy_goes_on_under_it_only(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    out = killed_run(hospital, monkeypatch, hospital.write_policy())
    charged = hospital.charged()
    assert "begun under a policy; name the same one with --policy" in refused(
        hospital.command("simulate", "--resume", out), code=2
    )
    assert hospital.charged() == charged
    assert hospital.command("simulate", "--resume", out, "--policy", hospital.policy).code == 0
    assert hospital.charged() > charged
    assert not RunFolder(out).ledger_file.exists()


def test_a_run_without_a_policy_does_not_go_on_under_one(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    out = killed_run(hospital, monkeypatch, None)
    hospital.write_policy()
    said = hospital.command("simulate", "--resume", out, "--policy", hospital.policy)
    assert "begun without a policy; leave --policy out" in refused(said, code=2)
    assert hospital.charged() == 0
    assert hospital.command("simulate", "--resume", out).code == 0


def test_a_stricter_policy_ends_a_run_under_way(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    out = killed_run(hospital, monkeypatch, hospital.write_policy())
    charged = hospital.charged()
    hospital.write_policy(("most_rounds = 2", "most_rounds = 1"))
    refused(hospital.command("simulate", "--resume", out, "--policy", hospital.policy))
    assert hospital.charged() == charged


def test_a_policy_is_no_option_under_flower(hospital: Hospital) -> None:
    hospital.write_policy()
    assert "fedlora site serve" in refused(hospital.ask("run.transport=flower"), code=2)


def test_several_sites_cannot_share_out_one_data_sets_budget(hospital: Hospital) -> None:
    hospital.write_policy(("most_clients = 1", "most_clients = 3"))
    said = refused(hospital.ask("federation.clients=3", "training.expected_batch_size=8"))
    assert "set federation.clients=1" in said
    assert (hospital.runs, hospital.charged()) == ([], 0)


def test_a_site_without_a_round_of_its_own_is_not_measured_by_the_noise_it_would_add(hospital: Hospital) -> None:
    hospital.write_policy(('source = "records"', 'source = "generated"'), ("most_clients = 1", "most_clients = 3"))
    few = ("federation.clients=3", "federation.participation=0.3", "federation.rounds=1", "model.head=frozen")
    assert hospital.ask(*few, "data.generated_records=240", "privacy.delta=1e-3").code == 0


@pytest.mark.parametrize(
    ("rule", "near"), [("methods", "ffa"), ("mechanisms", "gaussian"), ("noise", "device"), ("phases", "finetune")]
)
def test_what_does_not_exist_cannot_be_allowed(hospital: Hospital, rule: str, near: str) -> None:
    """A typing error would otherwise be found when the first run is refused."""
    hospital.write_policy()
    text = hospital.policy.read_text().replace('phases = ["prototype", "finetune"]', f'{rule} = ["{near}x"]')
    hospital.policy.write_text(text)
    with pytest.raises(PolicyRefused, match=rf"{rule}.*{near}"):
        SitePolicy.from_toml(hospital.policy)
