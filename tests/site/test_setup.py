"""A new site's policy is what its owner said, explains itself, and takes nothing's place."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fedlora.errors import ConfigError, DataError
from fedlora.models import locate_model
from fedlora.privacy.accounting import Charge
from fedlora.privacy.ledger import DataSet, Ledger, Request
from fedlora.privacy.policy import Allow, DataPolicy, Limits, SitePolicy, SiteSection, TlsSection
from fedlora.site import setup
from fedlora.site.setup import NewSite, policy_text, set_up_site, suggested_delta
from tests.command_line import Said, typed
from tests.numbers import tells

ROOT = Path(__file__).resolve().parents[2]
RECORDS = 613  # a number that occurs nowhere else
MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
Init = Callable[..., Said]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with records, in which the owner stands."""
    (tmp_path / "records").mkdir()
    table = pyarrow.table({"sentence": ["a good film"] * RECORDS, "label": [n % 2 for n in range(RECORDS)]})
    pyarrow.parquet.write_table(table, tmp_path / "records" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def init(
    place: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Init:
    def run(*words: object) -> Said:
        model = () if "--model" in words else ("--model", tiny_model("bert"))
        return typed(("site", "init", *words, *model), monkeypatch, capfd)

    return run


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_answers_make_a_site(place: Path, init: Init, tiny_model: Callable[..., Path]) -> None:
    said = init("ward", "--data", "records", "--task", "sst2")
    assert said.code == 0, said.err
    folder = place / "ward"
    assert (mode(folder), mode(folder / "site.toml"), mode(folder / "ledger.sqlite")) == (0o700, 0o600, 0o600)
    assert names(folder) == ["ledger.sqlite", "site.toml"]
    assert Ledger.read(folder / "ledger.sqlite").entries() == []
    policy = SitePolicy.from_toml(folder / "site.toml")
    assert (policy.site, policy.limits, policy.allow, policy.tls) == (SiteSection(), Limits(), Allow(), None)
    model = str(tiny_model("bert"))
    assert policy.models == {model: locate_model(model).digest}
    assert policy.data == {
        "records": DataPolicy(task="sst2", source=str(place / "records"), max_epsilon=6.0, max_delta=1e-4)
    }
    assert "fedlora site check ward/site.toml" in said.out.splitlines()[-1]
    for text in ((folder / "site.toml").read_text(), said.out):
        assert not tells(text, RECORDS)


def test_every_answer_is_in_the_policy(place: Path, init: Init) -> None:
    words = ["--data", "records", "--task", "cola", "--name", 'Station "7", ä', "--max-epsilon", "2.5"]
    table = pyarrow.table({"sentence": ["a film"] * 20, "label": [0, 1] * 10})
    pyarrow.parquet.write_table(table, place / "records" / "train.parquet")
    said = init(*words, "--max-delta", "0.003", "--public-size", "500")
    assert said.code == 0, said.err
    assert SitePolicy.from_toml(place / "site.toml").data == {
        'Station "7", ä': DataPolicy(task="cola", source="records", max_epsilon=2.5, max_delta=0.003, public_size=500)
    }


def test_records_below_the_site_are_named_from_there_even_if_called_like_no_folder(place: Path, init: Init) -> None:
    (place / "records").rename(place / "generated")
    assert init("--data", "./generated", "--task", "sst2").code == 0
    assert SitePolicy.from_toml(place / "site.toml").data["generated"].source == "./generated"


@pytest.mark.parametrize(("num_records", "delta"), [(1, 0.1), (10, 0.01), (11, 1e-3), (1000, 1e-4), (67349, 1e-6)])
def test_the_suggested_delta_is_a_power_of_ten_a_tenth_of_one_over_n_or_less(num_records: int, delta: float) -> None:
    assert suggested_delta(num_records) == delta
    assert delta <= 0.1 / num_records + 1e-18 < 10 * delta + 1e-17


def test_a_size_that_stays_decides_about_no_delta(place: Path, init: Init) -> None:
    assert init("--data", "records", "--task", "sst2", "--public-size", "90").code == 0
    assert SitePolicy.from_toml(place / "site.toml").data["records"].max_delta == 1e-3


@pytest.mark.parametrize("delta", ["0.01", "0.4"])
def test_a_delta_at_which_a_record_may_be_published_is_refused(place: Path, init: Init, delta: str) -> None:
    said = init("ward", "--data", "records", "--task", "sst2", "--max-delta", delta)
    assert said.code == 2
    assert "one over the number of records" in said.err
    assert not tells(said.err, RECORDS)
    assert not (place / "ward").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--data", "nowhere", "--task", "sst2"), "--data nowhere is no folder"),
        (("--data", "records", "--task", "sst3"), "sst3"),
        (("--data", "records", "--task", "qnli"), "question"),
        (("--data", "hub", "--task", "sst2"), "asks no hub"),
        (("--data", "records", "--task", "sst2", "--max-epsilon", "-1"), "max_epsilon"),
        (("--data", "records", "--task", "sst2", "--public-size", "many"), "--public-size"),
        (("--data", "records", "--task", "sst2", "--public-size", "0"), "public_size"),
        (("--data", "records", "--task", "sst2", "--name", "a\nb"), "name"),
        (("--data", "records", "--task", "sst2", "--model", "nobody/no-model"), "fedlora bundle nobody/no-model"),
        (("--data", "records"), "--task"),
    ],
)
def test_a_wrong_answer_leaves_nothing(place: Path, init: Init, words: tuple[str, ...], says: str) -> None:
    said = init("ward", *words)
    assert said.code == 2
    assert says in said.err
    assert "Traceback" not in said.err
    assert names(place) == ["records"]


def test_nothing_is_overwritten(place: Path, init: Init) -> None:
    words = ("--data", "records", "--task", "sst2")
    assert init(*words).code == 0
    before = {name: (place / name).read_bytes() for name in ("site.toml", "ledger.sqlite")}
    said = init(*words, "--max-epsilon", "9")
    assert said.code == 2
    assert "site.toml exists" in said.err
    assert before == {name: (place / name).read_bytes() for name in before}
    assert names(place) == ["ledger.sqlite", "records", "site.toml"]


def test_a_ledger_with_charges_gets_no_new_policy(place: Path, init: Init) -> None:
    ledger = Ledger.open(place / "ledger.sqlite")
    request = Request(
        data_set=DataSet(fingerprint="f", name="records"),
        charge=Charge(0.1, 1.0, 1),
        run="r",
        round_index=0,
        purpose="finetune",
    )
    ledger.reserve([request])
    ledger.close()
    before = (place / "ledger.sqlite").read_bytes()
    said = init("--data", "records", "--task", "sst2")
    assert said.code == 2
    assert "ledger.sqlite is a ledger with 1 rows" in said.err
    assert not (place / "site.toml").exists()
    assert (place / "ledger.sqlite").read_bytes() == before


@pytest.mark.parametrize("step", ["_make_ledger", "_put", "link"])
def test_what_was_cut_off_is_made_again(
    place: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    site = NewSite(task="sst2", data="records", model=str(tiny_model("bert")))

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os if step == "link" else setup, step, die)
        with pytest.raises(KeyboardInterrupt):
            set_up_site(place / "ward", site)
    assert not (place / "ward" / "site.toml").exists()
    set_up_site(place / "ward", site)
    assert names(place / "ward") == ["ledger.sqlite", "site.toml"]


def test_an_empty_file_that_a_killed_attempt_left_becomes_the_ledger(
    place: Path, tiny_model: Callable[..., Path]
) -> None:
    (place / "ledger.sqlite").touch(0o600)
    set_up_site(place, NewSite(task="sst2", data="records", model=str(tiny_model("bert"))))
    assert Ledger.read(place / "ledger.sqlite").entries() == []


def test_of_two_at_once_one_wins(place: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    site = NewSite(task="sst2", data="records", model=str(tiny_model("bert")))

    def other_first(path: Path) -> None:
        (place / "site.toml").write_text("the other's")

    monkeypatch.setattr(setup, "_make_ledger", other_first)
    with pytest.raises(ConfigError, match="not overwritten"):
        set_up_site(place, site)
    assert (place / "site.toml").read_text() == "the other's"


def test_a_model_in_the_sites_own_folder_keeps_its_name(place: Path, tiny_model: Callable[..., Path]) -> None:
    own = place / "models" / "someone" / "tiny"
    own.parent.mkdir(parents=True)
    own.symlink_to(tiny_model("bert"))
    by_name = set_up_site(place, NewSite(task="sst2", data="records", model="someone/tiny")).policy
    assert by_name.models == {"someone/tiny": locate_model(str(own)).digest}


def test_records_that_are_too_few_for_the_declared_size_do_not_pass(
    place: Path, tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match="max_delta"):
        set_up_site(place, NewSite(task="sst2", data="records", model=str(tiny_model("bert")), public_size=1))


def test_the_documented_policy_is_the_one_that_is_made() -> None:
    data = DataPolicy(task="sst2", source="records", max_epsilon=6.0, max_delta=1e-5)
    made = policy_text("ward", data, model=NewSite.model, model_digest=MINILM)
    assert (ROOT / "docs" / "site.toml").read_text() == made, "write what `policy_text` gives into docs/site.toml"


def test_every_key_stands_in_the_policy_with_its_default_and_a_word(place: Path) -> None:
    text = (ROOT / "docs" / "site.toml").read_text()
    for section in (SiteSection, TlsSection, Limits, Allow, DataPolicy):
        for key in fields(section):
            assert re.search(rf"^(# )?{key.name} = ", text, re.MULTILINE), key.name
    uncommented = re.sub(r"^# (\[tls\]|\w+ = )", r"\1", text, flags=re.MULTILINE)
    (place / "site.toml").write_text(uncommented)
    assert SitePolicy.from_toml(place / "site.toml").tls is not None, "as it stands there, without the comment signs"
