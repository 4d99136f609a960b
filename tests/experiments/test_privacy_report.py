"""PRIVACY.md says what the record says, in every case, and nothing that has to stay at a site."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.data.fingerprint import fingerprint
from fedlora.errors import RunInterrupted
from fedlora.experiments.privacy_facts import epsilon_alone, less_noise, oversight_facts
from fedlora.experiments.privacy_report import most_detected, privacy_report
from fedlora.experiments.record import guarantee_of
from fedlora.experiments.run_folder import RunFolder, to_json
from fedlora.experiments.simulate import CohortTransport, resume, run_server, simulate
from fedlora.federation.messages import ClientFailure
from fedlora.federation.sites import load_simulated_data
from fedlora.models import locate_model
from fedlora.privacy.accounting import Charge, epsilon
from fedlora.privacy.egress import FACTS, PHASE_FACTS
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.policy import SitePolicy
from fedlora.privacy.units import rounded_up
from tests.numbers import tells

MakeRun = Callable[..., RunConfig]
Record = dict[str, Any]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
UNSOUND = ("privacy.mechanism=gredp", "privacy.gredp_noise=real", "privacy.allow_unsound=true")


class Silent:
    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...

    def round(self, report: Any) -> None: ...

    def finish(self, record: Any) -> None: ...


@pytest.fixture
def make_run(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> MakeRun:
    """`make_run("section.key=value", …)`: a private run with prototypes and a varying cohort."""

    def make(*overrides: str, out: str = "run") -> RunConfig:
        own = ("model.head=prototype", "federation.participation=0.67", "privacy.seeded_noise=false")
        fast = ("privacy.accountant=rdp", "training.learning_rate=0.02", f"run.out='{tmp_path / out}'")
        return tiny_config(*own, *fast, *overrides)

    return make


def read(path: Path) -> tuple[str, Record]:
    return (path / "PRIVACY.md").read_text(), json.loads((path / "record.json").read_text())


def done(config: RunConfig, policy: SitePolicy | None = None) -> tuple[str, Record]:
    return read(simulate(config, Silent(), policy))


def tables(report: str) -> list[list[list[str]]]:
    """Every table as rows of cells, heads first; fails where a line has another number of cells than its head."""
    found: list[list[list[str]]] = []
    inside = False
    for line in report.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not inside:
            found.append([])
        found[-1].append(cells)
        inside = True
    for table in found:
        assert len(table) >= 2
        assert table[1] == ["---"] * len(table[0])
        assert {len(row) for row in table} == {len(table[0])}, table
        del table[1]
        assert len(table) > 1, f"no rows under {table[0]}"
    return found


def table(report: str, head: str) -> list[dict[str, str]]:
    """Rows of the table that has a column `head`, as dictionaries."""
    heads, *rows = next(found for found in tables(report) if head in found[0])
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_the_report_can_be_made_anew_from_the_file(make_run: MakeRun) -> None:
    report, record = done(make_run())
    assert privacy_report(record) == report
    assert re.findall(r"^# .*$", report, re.MULTILINE) == ["# Privacy report: sst2, ffa, 3 sites"]


def test_the_verdict_is_that_of_the_site_that_spent_most(make_run: MakeRun) -> None:
    report, record = done(make_run("data.partition=label_skew"))
    spent = {facts["client"]: facts["epsilon"] for facts in record["clients"]}
    worst = max(spent, key=lambda client: spent[client])
    assert record["privacy"]["guarantee"] == {
        "epsilon": spent[worst],
        "delta": 1e-3,
        "accountant": "rdp",
        "unit": "record",
        "relation": "add/remove",
        "noise_seeded": False,
        "unsound": False,
        "noise_by": "site",
    }
    assert f"**ε = {rounded_up(spent[worst]):g} at δ = 0.001 for one record of one site (add/remove)" in report
    assert f"That is site {worst}, which spent most" in report
    assert "spent the same" not in report
    assert "NO GUARANTEE" not in report


def test_no_site_is_named_where_all_spent_the_same(make_run: MakeRun) -> None:
    report, _ = done(make_run("federation.participation=1"))
    assert "all that took part spent the same" in report
    assert "which spent most" not in report


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("privacy.epsilon=inf",), ["ε = ∞, run without noise"]),
        (("privacy.seeded_noise=true",), ["noise seeded, not private"]),
        (UNSOUND, ["ε = ∞, GReDP with real noise releases g_j − g_(n−j) as it is"]),
        ((*UNSOUND, "privacy.epsilon=inf"), ["ε = ∞, run without noise"]),
        ((*UNSOUND, "privacy.seeded_noise=true"), ["noise seeded", "GReDP with real noise"]),
    ],
    ids=["inf", "seeded", "unsound", "unsound-inf", "unsound-seeded"],
)
def test_no_guarantee_is_said_in_big_letters_and_why(
    make_run: MakeRun, tmp_path: Path, overrides: tuple[str, ...], why: list[str]
) -> None:
    report, record = done(make_run(*overrides))
    said = re.findall(r"^# NO GUARANTEE: (.*)$", report, re.MULTILINE)
    assert len(said) == len(why)
    assert all(part in line for part, line in zip(why, said, strict=True))
    assert "**ε = " not in report
    assert "the guarantee above" not in report
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "**Guarantee**: no guarantee: " in card
    assert all(part in card for part in why)
    assert record["private"] is False


def test_every_phase_stands_with_the_records_numbers(make_run: MakeRun) -> None:
    report, record = done(make_run("privacy.mechanism=gredp", "privacy.gredp_noise=complex_half"))
    rows = table(report, "effective σ")
    assert {row["phase"] for row in rows} == {"prototype", "finetune"}
    for facts, site in zip(record["clients"], record["privacy"]["sites"], strict=True):
        for phase, extra in zip(facts["phases"], site["phases"], strict=True):
            (row,) = [row for row in rows if row["phase"] == phase["name"] and covers(row["sites"], facts["client"])]
            assert float(row["q"]) == pytest.approx(phase["sampling_probability"], rel=1e-5)
            assert float(row["effective σ"]) == pytest.approx(phase["effective_noise_multiplier"], rel=1e-5)
            assert float(row["nominal σ"]) == pytest.approx(extra["noise_multiplier"], rel=1e-5)
            assert float(row["sensitivity"]) == pytest.approx(phase["sensitivity"], rel=1e-5)
            assert int(row["steps"]) == phase["num_steps"]
            assert float(row["ε of the phase alone"]) == rounded_up(extra["epsilon_alone"])
            assert extra["epsilon_alone"] <= facts["epsilon"] * (1 + 1e-3)
            assert ("Poisson" in row["sampler"]) == (phase["name"] == "finetune")
            ratio = extra["noise_multiplier"] / phase["effective_noise_multiplier"]
            assert ratio == pytest.approx(math.sqrt(2) if phase["name"] == "finetune" else 1.0)
        (row,) = [row for row in table(report, "δ") if covers(row["sites"], facts["client"])]
        assert float(row["ε released"]) == float(row["ε charged"]) == rounded_up(facts["epsilon"])
        assert int(row["rounds asked for"]) == int(row["rounds charged"]) == site["rounds_asked"]
        assert int(row["updates that arrived"]) == site["rounds_asked"]
    assert "resumed" not in report
    assert sum(site["rounds_asked"] for site in record["privacy"]["sites"]) == 3 + 3 * 2, "all, then two a round"


def covers(sites: str, client: int) -> bool:
    runs = [[int(end) for end in run.split("–")] for run in sites.split(", ")]
    return any(run[0] <= client <= run[-1] for run in runs)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_snippet_of_the_report_finds_the_same_epsilon(make_run: MakeRun, tmp_path: Path, accountant: str) -> None:
    report, record = done(make_run(f"privacy.accountant={accountant}", "data.partition=label_skew"))
    (snippet,) = FENCE.findall(report)
    assert len(snippet.splitlines()) == 5
    assert "fedlora" not in snippet
    ran = subprocess.run(
        [sys.executable, "-I", "-c", snippet], cwd=tmp_path / "run", capture_output=True, text=True, check=True
    )
    printed = {int(client): float(value) for client, value in map(str.split, ran.stdout.splitlines())}
    assert printed == {facts["client"]: pytest.approx(facts["epsilon"], rel=1e-3) for facts in record["clients"]}


def test_a_run_without_noise_has_nothing_to_derive(make_run: MakeRun) -> None:
    report, _ = done(make_run("privacy.epsilon=inf"))
    assert not FENCE.findall(report)
    seeded, _ = done(make_run("privacy.seeded_noise=true", out="seeded"))
    assert FENCE.findall(seeded)
    assert "This one has none" in seeded


def test_what_left_is_listed_whole(make_run: MakeRun) -> None:
    report, record = done(make_run())
    vectors = record["privacy"]["vectors_out"]
    assert sum(vector["bytes"] * vector["updates"] for vector in vectors) == record["bytes_up"]
    for vector in vectors:
        assert sum(slot["bytes"] for slot in vector["slots"]) == vector["bytes"]
        assert all(4 * math.prod(slot["shape"]) == slot["bytes"] for slot in vector["slots"])
    listed = {(row["phase"], row["slot"]): row for row in table(report, "slot")}
    assert len(listed) == sum(1 + len(vector["slots"]) for vector in vectors)
    assert listed["prototype", "prototype/sums"]["shape"] == "2 × 16"
    given = {key for facts in record["clients"] for key in facts}
    assert given == FACTS.keys()
    reasons = {name: row["why they may leave"] for row in table(report, "facts") for name in row["facts"].split(", ")}
    whys = {name: fact.why for name, fact in FACTS.items()}
    whys |= {f"phases: {name}": fact.why for name, fact in PHASE_FACTS.items()}
    assert reasons == whys


SEARCHES = {
    "warmup": ("adapter.select=warmup", "adapter.warmup_rounds=2"),
    "alignment": ("adapter.select=alignment", "adapter.warmup_rounds=1"),
    "bilevel": ("adapter.select=bilevel", "adapter.warmup_rounds=1", "adapter.search_rounds=1"),
}
GREDP = ("privacy.mechanism=gredp", "privacy.gredp_noise=complex_half")


@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_is_explained_listed_and_priced_by_the_snippet(make_run: MakeRun, tmp_path: Path, method: str) -> None:
    report, record = done(make_run(*SEARCHES[method], *GREDP))
    phases = {"prototype", "warmup", method, "finetune"}
    assert {row["phase"] for row in table(report, "effective σ")} == phases
    assert set(re.findall(r"^- \*(\w+)\*: ", report, re.MULTILINE)) == phases, "each in plain words, and no other"
    for row in table(report, "effective σ"):
        trains = row["phase"] in ("warmup", "bilevel", "finetune")
        ratio = float(row["nominal σ"]) / float(row["effective σ"])
        assert ratio == pytest.approx(math.sqrt(2) if trains else 1.0, rel=1e-4)
    assert re.search(rf"^{method} chose 6 of 12 modules.*: one choice for all sites", report, re.MULTILINE)
    assert "so it costs nothing more" in report
    assert ("**Why one charge pays for weights and gates.**" in report) == (method == "bilevel")
    (snippet,) = FENCE.findall(report)
    ran = subprocess.run(
        [sys.executable, "-I", "-c", snippet], cwd=tmp_path / "run", capture_output=True, text=True, check=True
    )
    printed = {int(client): float(value) for client, value in map(str.split, ran.stdout.splitlines())}
    assert printed == {facts["client"]: pytest.approx(facts["epsilon"], rel=1e-3) for facts in record["clients"]}
    assert privacy_report(record) == report


@pytest.mark.parametrize("method", SEARCHES)
def test_all_candidates_left_in_a_search_though_fewer_did_later(make_run: MakeRun, method: str) -> None:
    _, record = done(make_run(*SEARCHES[method]))
    released = {vector["phase"]: vector for vector in record["privacy"]["vectors_out"]}
    assert sum(vector["bytes"] * vector["updates"] for vector in released.values()) == record["bytes_up"]
    candidates = len(record["selection"]["candidates"])
    assert [len(released[phase]["slots"]) for phase in ("warmup", "finetune")] == [candidates, candidates // 2]
    if method == "alignment":
        assert released["alignment"]["bytes"] == 4 * candidates
    if method == "bilevel":
        assert released["bilevel"]["bytes"] == released["warmup"]["bytes"] + 4 * candidates


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("all", "No record was looked at"),
        ("random", "the run's public seed"),
        ("probe", "made by a generator"),
        ("texts", "That these texts are public is the word of whoever gave them"),
        ("mask", "is their word"),
    ],
)
def test_a_choice_that_costs_nothing_says_why(make_run: MakeRun, tmp_path: Path, method: str, words: str) -> None:
    how = [f"adapter.select={method}"]
    if method == "texts":
        (tmp_path / "texts").write_text("a good film\nthe cast was dull\n")
        how = ["adapter.select=probe", f"adapter.probe_texts='{tmp_path / 'texts'}'"]
    if method == "mask":
        (tmp_path / "mask").write_text("encoder.layer.0.output.dense\n")
        how.append(f"adapter.mask='{tmp_path / 'mask'}'")
    report, record = done(make_run(*how))
    assert words in " ".join(report.split())
    assert {row["phase"] for row in table(report, "effective σ")} == {"prototype", "finetune"}
    assert "Why one charge" not in report
    assert str(tmp_path) not in report
    del record["selection"]
    assert "How the modules were chosen" not in privacy_report(record), "as in records from before there was a choice"


def test_the_card_says_which_modules_were_adapted(make_run: MakeRun, tmp_path: Path) -> None:
    done(make_run())
    assert "- **Adapted**: query, value\n" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    done(make_run("adapter.select=random", "adapter.sharing=type", out="chosen"))
    card = (tmp_path / "chosen" / "adapter" / "README.md").read_text()
    selection = json.loads((tmp_path / "chosen" / "selection.json").read_text())
    ups = sum(row["selected"] for row in selection["candidates"] if row["type"] == "up")
    assert "- **Adapted**: 6 of 12 modules (50%), chosen by random (" in card
    assert f" {ups} of 2 up, " in card
    assert "the others share one adapter with their type" in card


def test_a_choice_lies_in_the_folder_and_another_run_can_take_it(make_run: MakeRun, tmp_path: Path) -> None:
    _, first = done(make_run("adapter.select=random"))
    written = tmp_path / "run" / "selection.json"
    assert json.loads(written.read_text()) == first["selection"]
    assert (tmp_path / "run" / "dam.png").read_bytes().startswith(b"\x89PNG")
    _, second = done(make_run("adapter.select=mask", f"adapter.mask='{written}'", out="second"))
    chosen = [[row["selected"] for row in record["selection"]["candidates"]] for record in (first, second)]
    assert chosen[0] == chosen[1]
    done(make_run(out="third"))
    assert not (tmp_path / "third" / "selection.json").exists()


def test_a_private_evaluation_is_a_phase_like_any_other(make_run: MakeRun) -> None:
    report, record = done(make_run("federation.private_evaluation=true"))
    assert {row["phase"] for row in table(report, "effective σ")} == {"prototype", "finetune", "evaluation"}
    released = {vector["phase"]: vector for vector in record["privacy"]["vectors_out"]}
    assert released["evaluation"]["updates"] == 3
    assert sum(vector["bytes"] * vector["updates"] for vector in released.values()) == record["bytes_up"]


@pytest.mark.parametrize(("epsilon", "paid"), [("6", True), ("inf", False)])
def test_what_a_method_has_sites_keep_is_named_and_paid_for_only_where_noise_is(
    make_run: MakeRun, epsilon: str, paid: bool
) -> None:
    report, _ = done(make_run("adapter.method=fedsa", "model.head=trained", f"privacy.epsilon={epsilon}"))
    assert "each site keeps its own B and head." in report
    assert ("whoever is given a site's own model learns no more" in report) == paid


def test_noise_and_post_processing_are_those_of_the_run(make_run: MakeRun) -> None:
    plain, record = done(make_run())
    assert "ChaCha20, a cipher" in plain
    assert "noise_filter" not in plain
    assert "low_pass" not in plain
    filtered, _ = done(make_run("training.noise_filter=doppler", "privacy.low_pass=0.5", out="filtered"))
    assert "`training.noise_filter = doppler`" in filtered
    assert "`privacy.low_pass = 0.5`" in filtered
    record["privacy"]["noise_source"] = "device"
    assert "no cipher" in privacy_report(record)


# --- ledgers and policies --------------------------------------------------------------------------------------------


def test_the_runs_own_ledger_is_in_the_report(make_run: MakeRun, tmp_path: Path) -> None:
    report, record = done(make_run())
    assert "whose sites obeyed no policy" in report
    for row, facts in zip(record["privacy"]["ledger"], record["clients"], strict=True):
        asked = record["privacy"]["sites"][row["client"]]["rounds_asked"]
        assert (row["spent"], row["reserved"], row["abandoned"]) == (asked, 0, 0)
        assert row["epsilon"] == pytest.approx(facts["epsilon"], rel=1e-3)
        (shown,) = [shown for shown in table(report, "rounds released") if covers(shown["sites"], row["client"])]
        assert int(shown["rounds released"]) == asked
        assert float(shown["ε of all that is charged"]) == rounded_up(row["epsilon"])


def test_charges_without_a_release_are_told_apart(make_federation: Callable[..., Any]) -> None:
    """One round released, one released and done anew, one that died and was done anew, one charged and never ended."""
    federation = make_federation("privacy.seeded_noise=false", "privacy.accountant=rdp")
    site, ledger = federation.sites[0], federation.ledger
    entries = federation.workbench.schedule
    ledger.settle(ledger.reserve([site.request(federation.instruction(entries[0]))]))
    ledger.settle(ledger.reserve([site.request(federation.instruction(entries[1]))]))
    for _ in range(2):
        ledger.abandon("run-1", from_round=1)
        ledger.reserve([site.request(federation.instruction(entries[1]))])
    here = oversight_facts(ledger, "run-1", federation.sites, own_ledger=True)
    first, second = here["ledger"][:2]
    assert (first["spent"], first["reserved"], first["abandoned"]) == (2, 1, 1), "what may have left stays released"
    assert first["epsilon"] > 1.05 * site.plan.epsilon(), "four rounds are charged, three were planned"
    assert (second["spent"], second["epsilon"]) == (0, 0.0)
    other = oversight_facts(ledger, "run-2", federation.sites, own_ledger=True)["ledger"][0]
    assert (other["spent"], other["epsilon"]) == (0, first["epsilon"]), "ε is that of the data, over all runs"


@pytest.mark.parametrize("seeded", [False, True])
def test_rounds_that_died_and_were_done_anew_are_charged_apart_from_what_was_released(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, seeded: bool
) -> None:
    """Stopped in its prototype release, and twice in its last round."""
    config = make_run("federation.participation=1", f"privacy.seeded_noise={str(seeded).lower()}")
    genuine, stops = CohortTransport.exchange, {0: 1, 3: 2}

    def stopped(self: Any, instruction: Any, clients: Any) -> Any:
        replies = genuine(self, instruction, clients)
        if stops.get(instruction.round_index):
            stops[instruction.round_index] -= 1
            raise KeyboardInterrupt
        return replies

    monkeypatch.setattr(CohortTransport, "exchange", stopped)
    for attempt in range(3):
        with pytest.raises(RunInterrupted):
            simulate(config, Silent()) if attempt == 0 else resume(Path(config.run.out), Silent())
    report, record = read(resume(Path(config.run.out), Silent()))
    for facts, site in zip(record["clients"], record["privacy"]["sites"], strict=True):
        assert (site["rounds_asked"], site["rounds_charged"]) == (4, 7)
        anew = {"prototype": 1, "finetune": 2 * config.federation.local_steps}
        charges = [
            Charge(
                part["sampling_probability"], part["effective_noise_multiplier"], part["num_steps"] + anew[part["name"]]
            )
            for part in facts["phases"]
        ]
        assert site["epsilon_charged"] == pytest.approx(epsilon(charges, facts["delta"], "rdp"))
        assert site["epsilon_charged"] > 1.1 * facts["epsilon"]
        (row,) = [row for row in table(report, "ε charged") if covers(row["sites"], facts["client"])]
        shown = float(row["ε released"]), float(row["ε charged"])
        assert shown == (rounded_up(facts["epsilon"]), rounded_up(site["epsilon_charged"]))
        assert (row["rounds asked for"], row["rounds charged"]) == ("4", "7")
    most = max(site["epsilon_charged"] for site in record["privacy"]["sites"])
    said = f"together ε = {rounded_up(most):g} is charged to the site that was charged most"
    assert " ".join(report.split()).count(said) == (1 if seeded else 2), "in the table's section, and below a verdict"
    assert privacy_report(record) == report


def test_a_run_that_was_stopped_between_rounds_says_that_nothing_was_charged_twice(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Any, report: Any) -> None:
        raise KeyboardInterrupt

    config = make_run()
    with monkeypatch.context() as patch:
        patch.setattr(Silent, "round", stopped)
        with pytest.raises(RunInterrupted):
            simulate(config, Silent())
    report, record = read(resume(Path(config.run.out), Silent()))
    assert report.count("The run was stopped and resumed. No round was charged twice.") == 2
    assert all(site["rounds_charged"] == site["rounds_asked"] for site in record["privacy"]["sites"])


POLICY = """
[limits]
smallest_noise_multiplier = 0.2
[models]
"{model}" = "{digest}"
[data.ward]
task = "sst2"
source = "generated"
max_epsilon = 1000.0
max_delta = 1e-3
public_size = {size}
"""


@pytest.fixture
def make_policy(tmp_path: Path) -> Callable[..., SitePolicy]:
    def make(config: RunConfig, size: int | str) -> SitePolicy:
        (tmp_path / "ward").mkdir(exist_ok=True)
        path = tmp_path / "ward" / "site.toml"
        digest = locate_model(config.model.name).digest
        path.write_text(POLICY.format(model=config.model.name, digest=digest, size=json.dumps(size)))
        return SitePolicy.from_toml(path)

    return make


def test_nothing_that_stays_is_in_the_report_or_the_record(
    make_run: MakeRun, make_policy: Callable[..., SitePolicy], tmp_path: Path
) -> None:
    config = make_run("federation.clients=1", "federation.participation=1", "data.generated_records=207")
    policy = make_policy(config, 90)
    report, record = done(config, policy)
    with closing(Ledger.open(policy.ledger)) as ledger:
        fingerprints = {entry.fingerprint for entry in ledger.entries() if entry.fingerprint}
    assert fingerprints
    written = json.dumps(record, ensure_ascii=False)
    for secret in (*fingerprints, str(policy.path), str(policy.ledger), "ward"):
        assert secret not in report
        assert secret not in written
    assert str(tmp_path) not in report
    assert str(Path(config.model.name)) not in report
    assert str(tmp_path) not in json.dumps(record["privacy"])
    (facts,) = record["clients"]
    assert "num_examples" not in facts
    assert facts["sampling_probability"] == 16 / 90
    assert "num_examples" not in report
    record["config"]["data"]["generated_records"] = None  # of the public corpus that stands for the site's data here
    assert not tells("\n".join((report, json.dumps(record["privacy"]), json.dumps(record["clients"]))), 207)


def test_a_policys_ledger_stays_with_its_owner(make_run: MakeRun, make_policy: Callable[..., SitePolicy]) -> None:
    config = make_run("federation.clients=1", "federation.participation=1")
    policy = make_policy(config, "exact")
    report, record = done(config, policy)
    assert record["privacy"]["enforced"] == "policy"
    assert record["privacy"]["ledger"] is None
    digest = hashlib.sha256(policy.path.read_bytes()).hexdigest()
    assert record["privacy"]["policy"] == {"digest": digest, "max_epsilon": 1000.0, "max_delta": 1e-3}
    with closing(Ledger.read(policy.ledger)) as ledger:
        assert ledger.verify() not in json.dumps(record), "made of fingerprints, which tell of the records"
    assert "every simulated site obeyed it" in report
    assert "The ledger belongs to the site and stays with it" in report
    assert "num_examples" in report


# --- sites elsewhere -------------------------------------------------------------------------------------------------


def test_sites_elsewhere_and_failed_ones_are_reported(
    make_run: MakeRun, make_federation: Callable[..., Any], tmp_path: Path
) -> None:
    """As under Flower: the server has no ledger. Site 0 never answers, site 1 fails once."""
    overrides = ("privacy.seeded_noise=false", "privacy.accountant=rdp", "model.head=prototype")
    federation = make_federation(*overrides, f"run.out='{tmp_path / 'run'}'")

    class Failing:
        def exchange(self, instruction: Any, clients: tuple[int, ...]) -> list[Any]:
            failing = {0} | ({1} if instruction.round_index == 2 else set())
            answered = federation.exchange(instruction, tuple(set(clients) - failing))
            return [*answered, *(ClientFailure(client, "internal") for client in failing)]

    folder = RunFolder.create(federation.config)
    run_server(federation.config, folder, federation.workbench, Failing(), (), Silent())
    report, record = read(folder.path)
    tables(report)
    assert record["privacy"]["enforced"] == "sites"
    assert "limits of each site's own policy" in report
    assert "Of site 0 no update ever arrived" in report
    assert "stays with it" in report
    asked = [(site["rounds_asked"], site["rounds_answered"]) for site in record["privacy"]["sites"]]
    assert asked == [(4, 0), (4, 3), (4, 4)]
    spent = [facts["epsilon"] for facts in record["clients"]]
    assert spent[0] == federation.config.privacy.epsilon
    assert spent[1] == pytest.approx(spent[2], rel=1e-3), "who fails is charged"
    assert [row["sites"] for row in table(report, "effective σ")] == ["1–2", "1–2"]
    (snippet,) = FENCE.findall(report)
    ran = subprocess.run([sys.executable, "-I", "-c", snippet], cwd=folder.path, capture_output=True, text=True)
    assert [line.split()[0] for line in ran.stdout.splitlines()] == ["0", "1", "2"], ran.stderr


def test_texts_of_other_machines_cannot_break_the_page(make_run: MakeRun) -> None:
    _, record = done(make_run())
    clean = tables(privacy_report(record))
    hostile = copy.deepcopy(record)
    for facts in hostile["clients"]:
        facts["accountant"] = "a | b\n\n# x"
        for phase in facts["phases"]:
            phase["mechanism"] = "<img src=x> | ![](http://x) \r\n# fine"
    report = privacy_report(hostile)
    assert [len(found) for found in tables(report)] == [len(found) for found in clean]
    assert re.findall(r"^# .*$", report, re.MULTILINE) == ["# Privacy report: sst2, ffa, 3 sites"]
    assert "<img" not in report
    assert "![]" not in report


def test_numbers_that_no_accountant_can_price_promise_nothing() -> None:
    phase = {"sampling_probability": 0.0, "effective_noise_multiplier": 1.0, "num_steps": 1}
    assert epsilon_alone(phase, {"delta": 1e-5, "accountant": "rdp"}) == math.inf


def test_a_record_in_memory_and_one_read_from_json_give_one_report(make_run: MakeRun) -> None:
    report, record = done(make_run("privacy.epsilon=inf"))
    assert record["privacy"]["guarantee"]["epsilon"] == "inf"
    assert math.isinf(guarantee_of(record).epsilon)
    record["privacy"]["guarantee"]["epsilon"] = math.inf
    assert privacy_report(record) == report == privacy_report(to_json(record))


@pytest.mark.parametrize("noise", ["server", "shared"])
def test_a_report_on_clients_promises_nothing_of_records_and_nothing_against_the_server(
    make_run: MakeRun, noise: str
) -> None:
    _, known = done(make_run("privacy.prototype_noise_multiplier=20"))
    record = copy.deepcopy(known)
    record["privacy"]["guarantee"] |= {"unit": "client", "noise_by": noise}
    record["privacy"] |= {"cohort_size": 2, "less_noise": {"server": 9.5} if noise == "shared" else None}
    report = privacy_report(record)
    assert "Protected is the whole data of one client" in report
    (against,) = [rows for rows in tables(report) if rows[0] == ["who", "what holds"]]
    of_server = next(row[1] for row in against if row[0] == "server")
    assert of_server.startswith("nothing: it is trusted" if noise == "server" else "less:")
    assert ("ε = 9.5" in of_server) == (noise == "shared")
    of_other = next(row[1] for row in against if row[0] in ("one other client", "other clients"))
    assert of_other.startswith("the guarantee above")
    for claim in (
        *("one record of one site", "One vector of noised numbers"),
        *(
            "as long as the site's code",
            "it sees every single update, and the guarantee",
            "sums and counts without noise",
        ),
        *("*expected* batch size", "one record can move a step's sum"),
    ):
        assert claim in " ".join(privacy_report(known).split()), claim
        assert claim not in " ".join(report.split()), claim


def test_what_parts_of_shared_noise_leave_is_priced() -> None:
    client = RunConfig().with_overrides("privacy.unit=client", "model.head=frozen")
    everybody = ("federation.clients=8", "federation.minimum_clients=8")
    shared = client.with_overrides("privacy.client_noise=shared", *everybody)
    worst = {"num_steps": 5, "effective_noise_multiplier": 4.0, "delta": 1e-5, "accountant": "pld"}
    assert less_noise(shared, worst) == {
        "server": epsilon([Charge(1.0, 4.0 / math.sqrt(7), 5)], 1e-5),
    }
    assert less_noise(client, worst) is None
    assert less_noise(RunConfig(), worst) is None
    seeded = shared.with_overrides("privacy.seeded_noise=true")
    assert less_noise(seeded, worst) == {"server": math.inf}


def test_most_detected_is_the_line_of_the_trade_off() -> None:
    assert most_detected(0.0, 0.0) == pytest.approx(0.01)
    assert most_detected(1.0, 1e-5) == pytest.approx(0.01 * math.e + 1e-5)
    assert most_detected(6.0, 0.0) == pytest.approx(1 - 0.99 * math.exp(-6))
    assert most_detected(2000.0, 1e-5) == 1.0
    assert all(most_detected(eps, 1e-5) <= most_detected(eps + 0.1, 1e-5) for eps in map(float, range(20)))


def test_a_simulations_folder_holds_no_mark_of_the_records(make_run: MakeRun) -> None:
    """Who knows all records but one could test the last by a hash of all of them, noise or not."""
    config = make_run()
    data = load_simulated_data(config)
    marks = [fingerprint(data.records.subset(part)) for part in data.parts.values()]
    folder = simulate(config, Silent())
    for file in (file for file in Path(folder).rglob("*") if file.is_file()):
        content = file.read_bytes()
        for mark in marks:
            assert mark.encode() not in content
            assert bytes.fromhex(mark) not in content
