"""A sound site passes; whatever is put wrong is found, named, and comes with something to do. Nothing is written."""

from __future__ import annotations

import grp
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.certificates import make_certificates
from fedlora.errors import PrivacyError
from fedlora.models import locate_model
from fedlora.privacy.accounting import Charge
from fedlora.privacy.ledger import DataSet, Ledger, Request
from fedlora.privacy.policy import SitePolicy, TlsSection
from fedlora.randomness import SecretRoot
from fedlora.site import machine, permissions, rehearsal
from fedlora.site.answers import Answers
from fedlora.site.checks import (
    check_answers,
    check_daemon,
    check_ledger,
    check_offline,
    check_records,
    check_site,
    check_tls,
    check_weights,
)
from fedlora.site.daemon import _claimed
from fedlora.site.finding import Finding, bad, exit_code, good, refused, warning
from fedlora.site.permissions import check_permissions, check_socket
from tests.command_line import Said, typed
from tests.numbers import tells
from tests.site.conftest import RECORDS, SiteFolder

STRANGER = 54321


@pytest.fixture
def policy(site_folder: SiteFolder) -> SitePolicy:
    return SitePolicy.from_toml(site_folder.settings)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    return lambda *words: typed(("site", "check", *words), monkeypatch, capfd)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody gets to, as pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="fedlora-open-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def charge(path: Path) -> None:
    ledger = Ledger.open(path)
    for index in range(3):
        data_set = DataSet(fingerprint="f", name="ward")
        spending = Charge(0.1, 1.0, 1)
        ledger.reserve([Request(data_set=data_set, charge=spending, run="r", round_index=index, purpose="finetune")])
    ledger.close()


def marked(findings: Iterator[Finding] | list[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == check]
    assert found.advice or found.mark == "good"
    return found


def content(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# ----------------------------------------------------------------------------------------------------------- as a whole


def test_a_sound_site_passes_and_is_as_it_was(site_folder: SiteFolder, command: Callable[..., Said]) -> None:
    charge(site_folder.path / "ledger.sqlite")
    Answers.open(site_folder.path / "answers.sqlite").close()
    before = content(site_folder.path)
    said = command(site_folder.settings)
    assert said.code == 0, said.out
    assert "✗" not in said.out
    assert "3 rows intact" in said.out
    assert content(site_folder.path) == before


def test_programs_get_the_same(site_folder: SiteFolder, command: Callable[..., Said]) -> None:
    charge(site_folder.path / "ledger.sqlite")
    said = command(site_folder.settings, "--json")
    found = json.loads(said.out)
    assert said.code == 0
    assert {finding["mark"] for finding in found} == {"good"}
    assert {"policy", "records ward", "ledger", "clock", "room", "socket", "offline", "secrets", "software"} <= {
        finding["check"] for finding in found
    }


def test_a_broken_policy_is_named_and_refuses(site_folder: SiteFolder, command: Callable[..., Said]) -> None:
    site_folder.write_policy(("largest_clip_norm", "largest_clipnorm"))
    said = command(site_folder.settings)
    assert said.code == 3
    assert "largest_clipnorm" in said.out
    assert "did you mean" in said.out
    assert command(site_folder.path / "nothing.toml").code == 3


def test_an_altered_ledger_refuses_and_a_wrong_device_is_for_the_owner(
    site_folder: SiteFolder, command: Callable[..., Said]
) -> None:
    site_folder.write_policy(('device = "cpu"', 'device = "cuda:7"'))
    said = command(site_folder.settings)
    assert said.code == 2
    assert "cuda:7" in said.out
    charge(site_folder.path / "ledger.sqlite")
    with closing(sqlite3.connect(site_folder.path / "ledger.sqlite")) as connection:
        connection.execute("UPDATE entry SET noise_multiplier = 9 WHERE id = 2")
        connection.commit()
    said = command(site_folder.settings)
    assert said.code == 3
    assert "row 2" in said.out


def test_the_worst_mark_decides() -> None:
    marks = [good("a", "b"), warning("a", "b", "c"), bad("a", "b", "c"), refused("a", "b", "c")]
    assert [exit_code(marks[:count]) for count in range(5)] == [0, 0, 0, 2, 3]


# ------------------------------------------------------------------------------------------------------ records, models


def test_records_are_looked_at_by_column_label_and_number(site_folder: SiteFolder, policy: SitePolicy) -> None:
    def found() -> Finding:
        return check_records(policy, "ward", policy.data["ward"])

    assert found().mark == "good"
    assert str(RECORDS) in found().found
    file = site_folder.path / "records" / "train.parquet"
    for columns, says in (
        ({"text": ["a"] * 5, "label": [0] * 5}, "sentence"),
        ({"sentence": ["a"] * 5, "label": [0, 1, 2, 1, 0]}, "labels are outside 0 to 1"),
    ):
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        assert found().mark == "bad"
        assert says in found().found
    shutil.rmtree(file.parent)
    assert found().mark == "bad"


def test_too_large_a_delta_refuses_and_a_number_that_stays_is_not_shown(site_folder: SiteFolder) -> None:
    site_folder.write_policy(("max_delta = 1e-3", f"max_delta = 1e-3\npublic_size = {3 * RECORDS}"))
    policy = SitePolicy.from_toml(site_folder.settings)
    found = check_records(policy, "ward", policy.data["ward"])
    assert found.mark == "good"
    assert not tells(found.found, RECORDS)
    site_folder.write_policy(("max_delta = 1e-3", f"max_delta = {1 / RECORDS}"))
    policy = SitePolicy.from_toml(site_folder.settings)
    assert check_records(policy, "ward", policy.data["ward"]).mark == "refused"


def test_two_data_sets_of_one_task_refuse_and_generated_ones_are_said(site_folder: SiteFolder) -> None:
    second = '\n[data.other]\ntask = "sst2"\nsource = "generated"\nmax_epsilon = 1.0\nmax_delta = 1e-6\n'
    text = site_folder.settings.read_text()
    site_folder.settings.write_text(text + second)
    policy = SitePolicy.from_toml(site_folder.settings)
    assert {check_records(policy, name, data).mark for name, data in policy.data.items()} == {"refused"}
    site_folder.settings.write_text(text + second.replace("sst2", "cola"))
    policy = SitePolicy.from_toml(site_folder.settings)
    assert check_records(policy, "other", policy.data["other"]).mark == "warning"


def test_a_models_files_are_those_that_the_policy_means(
    site_folder: SiteFolder, policy: SitePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name, digest), *_ = policy.models.items()
    assert check_weights(policy, name).mark == "good"
    site_folder.write_policy((digest, "0" * 64))
    found = check_weights(SitePolicy.from_toml(site_folder.settings), name)
    assert found.mark == "refused"
    assert digest in found.found, "so that it can be compared and put in"
    site_folder.write_policy((f'"{name}"', '"someone/else"'))
    found = check_weights(SitePolicy.from_toml(site_folder.settings), "someone/else")
    assert found.mark == "bad"
    assert "fedlora bundle someone/else" in found.advice


def test_a_step_is_taken_on_public_texts_at_the_policys_limits(policy: SitePolicy) -> None:
    trial = rehearsal.Rehearsal(policy)
    (found,) = trial.check()
    assert found.mark == "good", found
    assert "rank 64" in found.found
    assert trial.most_weights == 2 * 2 * 16 * 64, "query and value of two layers"


def test_where_modules_may_be_searched_all_are_counted(site_folder: SiteFolder) -> None:
    site_folder.write_policy(('phases = ["prototype", ', 'phases = ["prototype", "warmup", "alignment", '))
    trial = rehearsal.Rehearsal(SitePolicy.from_toml(site_folder.settings))
    assert [finding.mark for finding in trial.check()] == ["good"]
    assert trial.most_weights == 2 * (5 * 16 + 24) * 64


def test_a_step_that_fails_is_found(
    site_folder: SiteFolder, tmp_path: Path, policy: SitePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(policy: SitePolicy) -> Finding:
        (found,) = rehearsal.Rehearsal(policy).check()
        assert found.advice
        return found

    (name,) = policy.models
    broken = tmp_path / "broken"
    shutil.copytree(name, broken)
    weights = load_file(broken / "model.safetensors")
    save_file(
        {key: tensor * float("nan") for key, tensor in weights.items()},
        broken / "model.safetensors",
        metadata={"format": "pt"},
    )
    site_folder.write_policy((f'"{name}"', f'"{broken}"'))
    assert "not finite" in tried(SitePolicy.from_toml(site_folder.settings)).found
    (broken / "tokenizer.json").write_text("{}")
    assert tried(SitePolicy.from_toml(site_folder.settings)).mark == "bad"
    for error, says in (
        (torch.OutOfMemoryError("no memory left"), "token_budget"),
        (PrivacyError("depends on the records beside it"), "token_budget = 1"),
    ):
        monkeypatch.setattr(rehearsal, "build_workbench", lambda *_, error=error: (_ for _ in ()).throw(error))
        found = tried(policy)
        assert found.mark == "bad"
        assert says in found.advice


# ------------------------------------------------------------------------------------------------------ ledger, answers


def test_a_ledger_that_is_none_or_is_lost_refuses(site_folder: SiteFolder, policy: SitePolicy) -> None:
    assert check_ledger(policy)[0].mark == "warning", "there never was one"
    Answers.open(policy.beside(policy.site.answers)).close()
    assert check_ledger(policy)[0].mark == "refused", "there was one"
    policy.ledger.write_text("no ledger at all")
    assert check_ledger(policy)[0].mark == "refused"
    policy.ledger.unlink()
    charge(policy.ledger)
    found, last = check_ledger(policy)
    assert (found.mark, last) == ("good", Ledger.read(policy.ledger).entries()[-1].time)


def test_answers_that_cannot_be_read_are_found(policy: SitePolicy) -> None:
    path = policy.beside(policy.site.answers)
    assert check_answers(policy).mark == "good"
    Answers.open(path).close()
    assert check_answers(policy).found == "of 0 runs"
    path.write_text("nothing of the kind")
    assert check_answers(policy).mark == "bad"


def test_a_daemon_at_work_is_said(policy: SitePolicy) -> None:
    assert "none" in check_daemon(policy).found
    with _claimed(policy):
        assert "one is running" in check_daemon(policy).found
    assert "none" in check_daemon(policy).found


def test_the_check_reads_a_ledger_that_is_in_use(site_folder: SiteFolder, policy: SitePolicy) -> None:
    charge(policy.ledger)
    with closing(Ledger.open(policy.ledger)) as _:
        assert check_ledger(policy)[0].mark == "good"


# ---------------------------------------------------------------------------------------------------------- permissions


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("site.toml", "permissions of the policy"),
        ("ledger.sqlite", "permissions of the ledger"),
        ("answers.sqlite", "permissions of the ledger"),
        ("records/train.parquet", "permissions of records ward"),
    ],
)
def test_what_others_can_read_or_write_is_found(
    site_folder: SiteFolder, policy: SitePolicy, monkeypatch: pytest.MonkeyPatch, name: str, check: str
) -> None:
    for path in (policy.ledger, policy.beside(policy.site.answers)):
        path.touch(0o600)
    path = site_folder.path / name
    path.chmod(0o644)
    assert marked(check_permissions(policy), check).mark == "good", "nobody else gets into the folder"
    site_folder.path.chmod(0o755)
    (site_folder.path / "records").chmod(0o711)
    found = marked(check_permissions(policy), check)
    assert found.mark == "bad"
    assert found.advice.startswith(f"chmod go-rwx {path}")
    for other in (site_folder.path / "records").glob("v*"):
        other.chmod(0o600)
    for mode, wanted in ((0o640, "good"), (0o660, "bad"), (0o602, "bad"), (0o600, "good")):
        path.chmod(mode)
        assert marked(check_permissions(policy), check).mark == wanted, oct(mode)
    _give_away(path, monkeypatch)
    found = marked(check_permissions(policy), check)
    assert found.mark == "bad"
    assert "belongs to" in found.found


def _give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(path, STRANGER, -1)
    else:
        monkeypatch.setattr(permissions.os, "geteuid", lambda: STRANGER)


def test_the_couriers_group_reads_no_record(site_folder: SiteFolder) -> None:
    group = grp.getgrgid(os.getegid()).gr_name
    site_folder.write_policy(("[site]", f'[site]\nsocket_group = "{group}"'))
    policy = SitePolicy.from_toml(site_folder.settings)
    path = site_folder.path / "records" / "train.parquet"
    path.chmod(0o640)
    assert "courier's group" in marked(check_permissions(policy), "permissions of records ward").found


def test_the_key_of_the_tls_address_is_for_the_daemon_alone(site_folder: SiteFolder) -> None:
    site_folder.settings.write_text(
        site_folder.settings.read_text()
        + '[tls]\naddress = "127.0.0.1:7443"\ncertificate = "a.pem"\nkey = "a.key"\ncouriers = "b.pem"\n'
    )
    (site_folder.path / "a.key").touch()
    (site_folder.path / "a.key").chmod(0o660)
    policy = SitePolicy.from_toml(site_folder.settings)
    assert marked(check_permissions(policy), "permissions of the TLS key").mark == "bad"


def test_certificates_that_do_not_fit_are_found(site_folder: SiteFolder) -> None:
    made = [make_certificates(site_folder.path / name, hosts=["127.0.0.1"], sites=1) for name in ("a", "b")]

    def found(key: Path) -> Finding:
        tls = TlsSection(
            address="127.0.0.1:7443",
            certificate=str(made[0].server),
            key=str(key),
            couriers=str(made[0].authority),
        )
        return check_tls(SitePolicy.from_toml(site_folder.settings), tls)

    assert found(made[0].server_key).mark == "good"
    assert found(made[1].server_key).mark == "bad"
    assert found(site_folder.path / "nothing.key").mark == "bad"


def test_a_folder_in_which_others_can_swap_the_policy_is_found(open_folder: Path, site_folder: SiteFolder) -> None:
    inner = open_folder / "site"
    inner.mkdir(0o700)
    shutil.copy(site_folder.settings, inner)
    policy = SitePolicy.from_toml(inner / "site.toml")
    assert marked(check_permissions(policy), "folders above them").mark == "good"
    inner.chmod(0o770)
    assert marked(check_permissions(policy), "folders above them").mark == "warning"
    open_folder.chmod(0o777)
    found = marked(check_permissions(policy), "folders above them")
    assert (found.mark, found.advice) == ("bad", f"chmod o-w {open_folder}")


def test_a_socket_that_cannot_be_or_that_nobody_reaches_is_found(site_folder: SiteFolder) -> None:
    def found(*lines: str) -> Finding:
        site_folder.write_policy(("[site]", "\n".join(("[site]", *lines))))
        finding = check_socket(SitePolicy.from_toml(site_folder.settings))
        assert finding.advice or finding.mark == "good"
        return finding

    group = grp.getgrgid(os.getegid()).gr_name
    assert found().mark == "good"
    assert "bytes" in found(f'socket = "{"s" * 100}"').found
    assert "no folder" in found('socket = "run/site.sock"').found
    assert "no socket" in found('socket = "site.toml"').found
    assert "no group" in found('socket_group = "fedlora-nobody-7"').found
    assert "does not get through" in found(f'socket_group = "{group}"').found
    site_folder.path.chmod(0o710)
    assert found(f'socket_group = "{group}"').mark == "good"


# -------------------------------------------------------------------------------------------------------------- machine


@pytest.mark.parametrize(
    ("kind", "mark"),
    [("ext4", "good"), ("nfs4", "bad"), ("cifs", "bad"), ("fuse.sshfs", "bad"), ("tmpfs", "warning")],
)
def test_a_ledger_belongs_on_a_local_disk(
    policy: SitePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mark: str
) -> None:
    place = policy.ledger.parent
    lines = [
        "22 1 8:1 / / rw - ext4 /dev/sda rw",
        f"30 22 0:40 / {place} rw,relatime shared:1 master:2 - {kind} host:/export rw",
        f"31 22 0:41 / {place}-other rw - ext4 /dev/sdb rw",
    ]
    table = tmp_path / "mountinfo"
    table.write_text("\n".join(lines))
    monkeypatch.setattr(machine, "_MOUNTS", table)
    assert marked(machine.check_disk(policy, None), "disk of the ledger").mark == mark


def test_mounts_with_blanks_and_mounts_over_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a b" / "called"
    place.mkdir(parents=True)
    shown = str(tmp_path / "a b").replace(" ", r"\040")
    table = tmp_path / "mountinfo"
    mounted = [("/", "ext4"), (shown, "nfs"), (shown, "xfs"), (f"{shown}/call", "nfs")]
    table.write_text("".join(f"1 0 0:4 / {mount} rw - {kind} x rw\n" for mount, kind in mounted))
    monkeypatch.setattr(machine, "_MOUNTS", table)
    assert machine.filesystem(place) == "xfs"
    monkeypatch.setattr(machine, "_MOUNTS", tmp_path / "nothing")
    assert machine.filesystem(place) is None


def test_a_disk_that_cannot_be_written_is_found(policy: SitePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "access", lambda path, mode: path != policy.ledger.parent)
    assert marked(machine.check_disk(policy, None), "disk of the ledger").mark == "bad"


def test_room_follows_from_the_adapters_size(policy: SitePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage(10**12, 0, 10**9))
    assert marked(machine.check_disk(policy, 10**5), "room").mark == "good"
    found = marked(machine.check_disk(policy, 10**7), "room")
    assert found.mark == "bad"
    assert "need 2.23" in found.found  # (16 + 2) runs x 4 bytes x 10^7 x 3, and 64 MiB


def test_a_clock_that_went_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_clock(None).mark == "good"
    assert machine.check_clock("2026-01-01T00:00:00Z").mark == "good"
    assert "last row" in machine.check_clock("2999-01-01T00:00:00Z").found
    with monkeypatch.context() as patch:
        patch.setattr(machine.time, "time", lambda: 10.0**9)
        assert "this package" in machine.check_clock(None).found
    readings = iter([time.time(), time.time(), time.time() + 3600])
    monkeypatch.setattr(machine.time, "time", lambda: next(readings))
    assert machine.check_clock(None).mark == "warning"


def test_the_zone_of_the_clock_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for zone in ("UTC+11", "UTC-11"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        assert machine.check_clock(stored).mark == "good"
    monkeypatch.undo()
    time.tzset()


def test_secrets_that_repeat_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_secrets().mark == "good"

    def unready(*_: Any) -> bytes:
        raise BlockingIOError

    with monkeypatch.context() as patch:
        patch.setattr(machine.os, "getrandom", unready)
        assert machine.check_secrets().mark == "bad"
    monkeypatch.setattr(SecretRoot, "from_os", lambda: SecretRoot(bytes(32)))
    assert machine.check_secrets().mark == "bad"


def test_a_policy_that_gives_the_records_guarantee_up_is_told(site_folder: SiteFolder) -> None:
    assert "units" not in [finding.check for finding in islice(check_site(site_folder.settings), 3)]
    site_folder.write_policy(("[allow]", '[allow]\nunits = ["record", "client"]'))
    found = marked(list(islice(check_site(site_folder.settings), 3)), "units")
    assert (found.mark, "records are promised nothing" in found.found) == ("warning", True)


def test_a_policy_that_wants_the_hub_is_told(site_folder: SiteFolder, policy: SitePolicy) -> None:
    assert check_offline(policy).mark == "good"
    site_folder.write_policy(('source = "records"', 'source = "hub"'))
    assert check_offline(SitePolicy.from_toml(site_folder.settings)).mark == "warning"


def test_a_model_in_a_cache_of_the_hub_is_said(policy: SitePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    (name,) = policy.models
    found = replace(locate_model(name), kind="hub")
    monkeypatch.setattr("fedlora.site.checks.locate_model", lambda _: found)
    assert check_weights(policy, name).mark == "warning"


def test_a_missing_folder_of_the_ledger_is_one_row_among_all(
    site_folder: SiteFolder, command: Callable[..., Said]
) -> None:
    site_folder.write_policy(('ledger = "ledger.sqlite"', 'ledger = "books/ledger.sqlite"'))
    said = command(str(site_folder.settings))
    assert said.code == 2
    assert "there is no folder" in said.out
    assert "packages" in said.out or "python" in said.out.lower(), "the rows after it are there"


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "127.0.0.1:99999", "here"])
def test_an_address_for_metrics_that_the_daemon_would_refuse_is_bad(
    site_folder: SiteFolder, command: Callable[..., Said], address: str
) -> None:
    site_folder.write_policy(("token_budget = 4096", f'token_budget = 4096\nmetrics = "{address}"'))
    said = command(str(site_folder.settings))
    assert said.code == 2
    assert "site.metrics" in said.out
