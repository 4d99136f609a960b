"""What a person reads of a ledger is what the ledger adds up, and reading changes nothing."""

from __future__ import annotations

import json
import math
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedlora.cli import main
from fedlora.experiments import budget as module
from fedlora.experiments.budget import read_budget
from fedlora.privacy.accounting import Charge, epsilon
from fedlora.privacy.ledger import Cap, DataSet, Ledger, Request
from fedlora.privacy.policy import SitePolicy

CHARGE = Charge(0.05, 1.5, 10)
CAP = Cap(epsilon=9.0, delta=1e-6)
WARD, RENAMED, CHANGED = (DataSet(fingerprint=f * 64, name=n) for f, n in (("a", "ward"), ("a", "new"), ("b", "new")))
OTHER = DataSet(fingerprint="c" * 64)

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Say:
    """`say(…)` is `fedlora budget …`: exit code, output and complaints."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedlora", "budget", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two budgets: one under three names and fingerprints, and one without a cap and with a round without noise."""
    path = tmp_path / "ledger.sqlite"
    with closing(Ledger.open(path)) as ledger:

        def reserve(data_set: DataSet, number: int, charge: Charge = CHARGE, cap: Cap | None = CAP) -> list[int]:
            facts: dict[str, Any] = {"run": "r[1]", "purpose": "finetune"}
            return ledger.reserve([Request(data_set=data_set, charge=charge, round_index=number, cap=cap, **facts)])

        ledger.settle(reserve(WARD, 0, Charge(1.0, 20.0, 1)))
        ledger.settle(reserve(OTHER, 0, Charge(0.1, 0.0, 1), None))
        ledger.settle(reserve(RENAMED, 1))
        reserve(CHANGED, 2)
        reserve(CHANGED, 3, cap=Cap(epsilon=8.0, delta=1e-6))
        ledger.abandon("r[1]", from_round=3)
    return path


def test_it_adds_up_as_the_ledger_does(path: Path) -> None:
    found = read_budget(path, delta=1e-5)
    ward, other = found.data_sets
    with closing(Ledger.read(path)) as ledger:
        for owner, one in ((WARD, ward), (RENAMED, ward), (CHANGED, ward), (OTHER, other)):
            assert one.epsilon_counted == epsilon(ledger.charges(owner), one.delta)
        assert (found.head, found.num_rows) == (ledger.verify(), 9)
    assert ward.epsilon_spent == epsilon([Charge(1.0, 20.0, 1), CHARGE], 1e-6) < ward.epsilon_counted
    assert (ward.names, ward.fingerprints) == (("ward", "new"), ("a" * 8, "b" * 8))
    assert (ward.cap_epsilon, ward.delta, ward.cap_from) == (8.0, 1e-6, "last charge")
    assert ward.epsilon_left == 8.0 - ward.epsilon_counted
    prototype, finetune = ward.runs
    assert (prototype.num_rounds, prototype.num_steps, finetune.num_rounds, finetune.num_steps) == (1, 1, 3, 30)
    assert finetune.states == {"spent": 1, "reserved": 1, "abandoned": 1}
    assert finetune.epsilon == epsilon([Charge(0.05, 1.5, 30)], 1e-6)
    assert (other.title, other.cap_epsilon, other.epsilon_left) == ("c" * 8, None, None)
    assert (other.delta, other.cap_from, other.epsilon_counted) == (1e-5, "command line", math.inf)


def test_an_update_that_left_stays_spent_though_its_round_is_done_anew(path: Path) -> None:
    with closing(Ledger.open(path)) as ledger:
        ledger.abandon("r[1]", from_round=0)
    assert read_budget(path, delta=1e-5).data_sets[0].epsilon_spent == epsilon([Charge(1.0, 20.0, 1), CHARGE], 1e-6)


def test_the_owners_policy_is_the_cap(path: Path) -> None:
    policy = path.parent / "site.toml"
    policy.write_text('[data.ward]\ntask = "sst2"\nsource = "/srv"\nmax_epsilon = 2.5\nmax_delta = 1e-7\n')
    ward, other = read_budget(path, delta=1e-5, policy=SitePolicy.from_toml(policy)).data_sets
    assert (ward.cap_epsilon, ward.delta, ward.cap_from) == (2.5, 1e-7, "policy")
    assert other.cap_epsilon is None


def test_many_kinds_are_bounded_and_marked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = read_budget(path, delta=1e-5).data_sets[0]
    monkeypatch.setattr(module, "MOST_KINDS", 1)
    loose = read_budget(path, delta=1e-5).data_sets[0]
    assert (tight.accountant, loose.accountant) == ("pld", "rdp")
    assert loose.epsilon_counted > tight.epsilon_counted


def test_units_are_kept_apart(path: Path) -> None:
    with closing(Ledger.open(path)) as ledger:
        client = DataSet(fingerprint="a" * 64, name="ward", unit="client")
        ledger.reserve([Request(data_set=client, charge=CHARGE, run="r", round_index=0, purpose="finetune")])
    found = read_budget(path, delta=1e-5).data_sets
    assert [(one.unit, one.num_rounds) for one in found] == [("record", 4), ("record", 1), ("client", 1)]


def test_an_epsilon_that_was_shown_is_shown_again_without_pricing_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    before = read_budget(path, delta=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(module, "epsilon", lambda *_: pytest.fail("priced"))
        assert read_budget(path, delta=1e-5) == before
    with closing(Ledger.open(path)) as ledger:
        ledger.settle(
            ledger.reserve([Request(data_set=WARD, charge=CHARGE, run="r", round_index=4, purpose="finetune", cap=CAP)])
        )
    ward = read_budget(path, delta=1e-5).data_sets[0]
    prototype, finetune = Charge(1.0, 20.0, 1), Charge(0.05, 1.5, 40)
    assert ward.epsilon_counted == epsilon([prototype, finetune], 1e-6), "one round more is another question"


@pytest.mark.parametrize("kept", ['"answer": -1.0', '"answer": "0"', '"answer": 0.01'])
def test_a_remembered_epsilon_that_was_edited_is_not_shown(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: str
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    before = read_budget(path, delta=1e-5)
    for entry in (tmp_path / "cache" / "epsilon").iterdir():
        entry.write_text(re.sub(r'"answer": [^,\n]+', kept, entry.read_text()))
    assert read_budget(path, delta=1e-5) == before


def test_other_text_of_the_pricing_is_another_question(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_budget(path, delta=1e-5)
    monkeypatch.setattr(module, "_pricing", lambda: "edited")
    monkeypatch.setattr(module, "epsilon", lambda *_: 77.0)
    assert read_budget(path, delta=1e-5).data_sets[0].epsilon_counted == 77.0


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_person_sees_it(say: Say, path: Path) -> None:
    code, out, err = say(path)
    assert (code, err) == (0, "")
    for part in (
        "ward, new: one record, add/remove, PLD",
        "r[1]",
        "1 spent ",
        "1 reserved",
        "1 abandoned",
        "∞",
        "cccccccc",
    ):
        assert part in out
    assert "a" * 9 not in out, "a fingerprint is never shown in full"
    assert "must not leave the site" in out
    assert "cap and δ from the last charge" in out
    assert "δ from the command line" in out


def test_runs_of_one_config_can_be_told_apart_on_a_narrow_terminal(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ids = [f"{'c' * 16}-{digit * 15}{end}" for digit in "ab" for end in "12"]
    with closing(Ledger.open(tmp_path / "ledger")) as ledger:
        for run in ids:
            facts: dict[str, Any] = {"charge": CHARGE, "round_index": 0, "purpose": "evaluation"}
            ledger.reserve([Request(data_set=WARD, run=run, **facts)])
    _, out, _ = say(tmp_path / "ledger")
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert "…" not in out
    assert "ε alone" in out
    folded = "".join(line.split(" ")[0] for line in out.splitlines())
    assert all(run in folded for run in ids)


def test_a_program_reads_it(say: Say, path: Path) -> None:
    code, out, _ = say(path, "--json", "--delta", "1e-4")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    ward, other = found["data_sets"]
    assert (code, found["rows"], other["epsilon_counted"], other["delta"]) == (0, 9, "inf", 1e-4)
    assert ward["epsilon_left"] == 8 - ward["epsilon_counted"]
    assert ward["runs"][1]["states"] == {"spent": 1, "reserved": 1, "abandoned": 1}


def test_reading_changes_nothing(say: Say, path: Path) -> None:
    before = path.read_bytes()
    for arguments in ([], ["--json"], ["--verify"]):
        assert say(path, *arguments)[0] == 0
    assert path.read_bytes() == before
    assert [*path.parent.iterdir()] == [path]


def test_another_sites_policy_is_not_passed_over(say: Say, path: Path) -> None:
    text = '[data.{}]\ntask = "sst2"\nsource = "/srv"\nmax_epsilon = 2.5\nmax_delta = 1e-7\n'
    own, other = path.parent / "own.toml", path.parent / "other.toml"
    own.write_text(text.format("ward"))
    other.write_text(text.format("war"))
    assert "cap and δ from the policy" in say(path, "--policy", own)[1]
    code, out, err = say(path, "--policy", other)
    assert (code, out) == (2, "")
    assert "names war, but what was charged to this ledger is new, ward" in err
    Ledger.open(path.parent / "empty").close()
    assert say(path.parent / "empty", "--policy", other)[0] == 0


def test_a_policy_has_no_say_in_what_is_verified(say: Say, path: Path) -> None:
    code, out, err = say(path, "--verify", "--policy", path.parent / "nope.toml")
    assert (code, out) == (2, "")
    assert "leave one of them out" in err
    assert say(path, "--policy", path.parent / "nope.toml")[0] == 3


def test_a_ledger_in_use_can_be_read(say: Say, path: Path) -> None:
    with closing(Ledger.open(path)) as ledger, ledger._file.transaction():
        code, out, _ = say(path, "--verify")
    assert (code, out.splitlines()[0]) == (0, "9 rows intact")


def test_a_head_is_printed_and_found_again(say: Say, path: Path) -> None:
    head = say(path, "--verify")[1].split()[-1]
    with closing(Ledger.open(path)) as ledger:
        ledger.abandon("r[1]", from_round=0)
    assert say(path, "--verify", "--head", head)[0] == 0
    code, out, err = say(path, "--verify", "--head", "0" * 64)
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert "head noted before" in err


@pytest.mark.parametrize("head", ["", "abc", "0" * 63, "0" * 65, "g" * 64, "A" * 64])
@pytest.mark.parametrize("verify", [True, False])
def test_what_is_no_digest_is_a_wrong_argument_and_no_broken_ledger(
    say: Say, path: Path, head: str, verify: bool
) -> None:
    code, out, err = say(path, "--head", head, *(["--verify"] if verify else []))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is no digest; wanted the 64 digits" in err


def test_a_broken_ledger_is_one_line(say: Say, path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE entry SET num_steps = 1 WHERE id = 4")
        other.commit()
    for arguments in ([path], [path, "--verify"]):
        code, out, err = say(*arguments)
        assert (code, out, err.count("\n")) == (3, "", 1)
    assert [*path.parent.iterdir()] == [path]


def test_what_is_no_ledger_is_a_wrong_argument(say: Say, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("ward: 3.2 spent\n" * 100)
    (tmp_path / "empty").touch()
    wrong = {"missing": "there is no ledger", ".": "there is no ledger", "/dev/zero": "there is no ledger"}
    wrong |= {"notes.txt": "is no ledger but not an SQLite file", "empty": "is no ledger but an empty file"}
    for name, reason in wrong.items():
        for more in ([], ["--verify"]):
            code, out, err = say(tmp_path / name, *more)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert reason in err
    assert say(tmp_path / "empty", "--delta", "2")[0] == 2


def test_an_empty_ledger_says_so(say: Say, tmp_path: Path) -> None:
    Ledger.open(tmp_path / "empty").close()
    assert "nothing has been charged" in say(tmp_path / "empty")[1]


def test_no_torch_is_loaded_and_no_accountant_for_what_was_shown_before(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    code = f"import sys; sys.argv = ['fedlora', 'budget', {str(path)!r}]\nfrom fedlora.cli import main\n"
    code += (
        "try: main()\nfinally: print('loaded:', *{'torch', 'dp_accounting', 'numpy'} & {*sys.modules}, file=sys.stderr)"
    )
    for loaded in ({"dp_accounting", "numpy"}, set()):
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert set(ended.stderr.splitlines()[-1].split()) == {"loaded:", *loaded}, ended.stderr
