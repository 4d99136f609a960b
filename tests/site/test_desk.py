"""The site decides: what it computes is the cohort's round, what it gave once it gives again, and no asker moves it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.data.encode import EncodedDataset
from fedlora.errors import LedgerUnavailable, PolicyRefused
from fedlora.federation import cohort, wire
from fedlora.federation.cohort import Cohort
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.privacy.ledger import Ledger
from fedlora.provenance import code_digest
from fedlora.site.answers import Answers
from fedlora.site.desk import LONGEST_LINE, Desk
from fedlora.site.protocol import Request
from tests.site.conftest import RECORDS, Asking, SiteFolder, update_in

SECRET = "the patient's name is in this sentence"


@pytest.fixture
def desk(site_folder: SiteFolder) -> Iterator[Desk]:
    opened = Desk(site_folder.settings)
    yield opened
    opened.close()


def charged(folder: SiteFolder) -> list[tuple[str | None, int | None, str]]:
    ledger = Ledger.read(folder.path / "ledger.sqlite")
    rows = [(entry.run, entry.round, entry.kind) for entry in ledger.entries()]
    ledger.close()
    return rows


def test_a_run_is_enrolled_for_and_done_round_by_round(desk: Desk, asking: Asking, site_folder: SiteFolder) -> None:
    joined = desk.answer(asking.enrol())
    assert (joined.code, joined.facts) == ("ok", {"client": 0, "code_digest": code_digest()})
    assert charged(site_folder) == []
    vectors = [update_in(desk.answer(asking.round(index))).vector for index in range(4)]
    assert [len(vector) for vector in vectors[1:]] == [asking.workbench.layout.size] * 3
    assert all(vector.abs().max() > 0 for vector in vectors)
    assert [row[1] for row in charged(site_folder) if row[2] == "reserved"] == [0, 1, 2, 3]


def test_the_same_question_has_the_same_answer_and_costs_nothing(
    desk: Desk, asking: Asking, site_folder: SiteFolder
) -> None:
    first = desk.answer(asking.round())
    rows = charged(site_folder)
    assert desk.answer(asking.round()) == first
    assert charged(site_folder) == rows


@pytest.mark.parametrize("how", ["theta", "client"])
def test_another_question_for_a_round_that_is_over_is_refused(
    desk: Desk, asking: Asking, site_folder: SiteFolder, how: str
) -> None:
    """Two noised answers to one charge would halve the noise."""
    desk.answer(asking.round())
    answer = update_in(desk.answer(asking.round(1)))
    rows = charged(site_folder)
    other = asking.round(1, theta=0.1) if how == "theta" else asking.round(1, client=1)
    assert desk.answer(other).code == "over"
    assert charged(site_folder) == rows
    assert torch.equal(update_in(desk.answer(asking.round(1))).vector, answer.vector), "the answer is still kept"


def test_replayed_and_reordered_rounds_are_refused(desk: Desk, asking: Asking, site_folder: SiteFolder) -> None:
    for index in (0, 2):  # a site may be passed over
        update_in(desk.answer(asking.round(index)))
    rows = charged(site_folder)
    assert [desk.answer(asking.round(index)).code for index in (0, 1)] == ["over", "over"]
    assert charged(site_folder) == rows
    update_in(desk.answer(asking.round(3)))


def test_a_daemon_started_anew_remembers(asking: Asking, site_folder: SiteFolder) -> None:
    first = Desk(site_folder.settings)
    answers = [first.answer(asking.round(index)) for index in (0, 1)]
    first.close()
    second = Desk(site_folder.settings)
    rows = charged(site_folder)
    assert second.answer(asking.round(1)) == answers[1]
    assert second.answer(asking.round(0)).code == "over"
    assert second.answer(asking.round(1, theta=0.1)).code == "over"
    assert charged(site_folder) == rows
    update_in(second.answer(asking.round(2)))
    second.close()


def test_what_is_charged_is_over_though_nothing_else_remembers_it(asking: Asking, site_folder: SiteFolder) -> None:
    first = Desk(site_folder.settings)
    first.answer(asking.round(0))
    first.close()
    (site_folder.path / "answers.sqlite").unlink()
    second = Desk(site_folder.settings)
    assert second.answer(asking.round(0)).code == "over"
    second.close()


def test_a_round_that_failed_half_way_is_spent(
    desk: Desk, asking: Asking, site_folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cohort, "class_sums", lambda *_: 1 / 0)
        assert desk.answer(asking.round()).code == "internal"
    assert [row[1:] for row in charged(site_folder)] == [(0, "reserved")]
    assert desk.answer(asking.round()).code == "over"


def test_two_runs_take_turns_and_each_is_charged(desk: Desk, asking: Asking, site_folder: SiteFolder) -> None:
    """Under one configuration, and with the first's answers still at hand when the second asks."""
    other = replace(asking, run_id=asking.run_id[:-1] + "1")
    site_folder.write_policy(("max_epsilon = 6.0", "max_epsilon = 60.0"))
    for index in range(2):
        ours, theirs = desk.answer(asking.round(index)), desk.answer(other.round(index))
        assert not torch.equal(update_in(ours).vector, update_in(theirs).vector), "each its own noise"
    assert desk.answer(asking.round(1)) != desk.answer(other.round(1))
    assert [row[0] for row in charged(site_folder) if row[2] == "reserved"] == [asking.run_id, other.run_id] * 2


LOOSER = {
    "privacy.epsilon=8": "data.max_epsilon",
    "privacy.clip_norm=2": "limits.largest_clip_norm",
    "privacy.seeded_noise=true": "sound",
    "privacy.delta=0.01": "data.max_delta",
    "federation.local_steps=3": "limits.most_steps_per_round",
    "federation.private_evaluation=true": "phases",
    "privacy.mechanism=gredp": "mechanisms",
    "model.name='another'": "models",
}


@pytest.mark.parametrize("override", LOOSER)
def test_looser_than_the_policy_is_refused_at_both_questions(
    desk: Desk, asking: Asking, site_folder: SiteFolder, override: str, caplog: pytest.LogCaptureFixture
) -> None:
    looser = asking.under(override)
    assert desk.answer(looser.enrol()).code == "refused"
    assert desk.answer(looser.round()).code == "refused"
    assert f"refused by the rule {LOOSER[override]}:" in caplog.text
    assert charged(site_folder) == []


def test_nothing_is_spent_past_the_cap(desk: Desk, asking: Asking, site_folder: SiteFolder) -> None:
    """One run fits; the next is not even begun."""
    for index in range(4):
        update_in(desk.answer(asking.round(index)))
    rows = charged(site_folder)
    assert desk.answer(replace(asking, run_id=asking.run_id[:-1] + "1").round()).code == "refused"
    assert charged(site_folder) == rows


def test_an_edit_of_the_policy_counts_at_once(desk: Desk, asking: Asking, site_folder: SiteFolder) -> None:
    update_in(desk.answer(asking.round(0)))
    site_folder.write_policy(("largest_clip_norm = 1.0", "largest_clip_norm = 0.5"))
    assert desk.answer(asking.round(1)).code == "refused"
    assert desk.answer(asking.round(0)).code == "refused", "what was answered before, too"
    site_folder.settings.write_text("[site")
    assert desk.answer(asking.round(1)).code == "refused"
    site_folder.write_policy()
    update_in(desk.answer(asking.round(1)))


def test_the_ledger_in_use_is_that_of_the_start(desk: Desk, asking: Asking, site_folder: SiteFolder) -> None:
    site_folder.write_policy(('ledger = "ledger.sqlite"', 'ledger = "other.sqlite"'))
    update_in(desk.answer(asking.round(0)))
    assert not (site_folder.path / "other.sqlite").exists()
    assert len(charged(site_folder)) == 2


def test_a_run_is_one_configuration(desk: Desk, asking: Asking, site_folder: SiteFolder) -> None:
    update_in(desk.answer(asking.round(0)))
    mixed = replace(asking, config=asking.config.with_overrides("training.learning_rate=1"))
    assert desk.answer(mixed.round(1)).code == "protocol"
    assert len(charged(site_folder)) == 2


BROKEN = {
    "no instruction": lambda asking: replace(asking.round(), instruction=b""),
    "half an instruction": lambda asking: replace(asking.round(), instruction=asking.round().instruction[:100]),
    "a client that is none of the run's": lambda asking: asking.round(client=3),
    "values out of range": lambda asking: asking.round(theta=11.0),
    "no configuration": lambda asking: Request(ask="round"),
    "an unknown key": lambda asking: replace(asking.round(), config={"privacy.epsilonn": 1.0}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_asked_costs_nothing(desk: Desk, asking: Asking, site_folder: SiteFolder, kind: str) -> None:
    assert desk.answer(BROKEN[kind](asking)).code in ("protocol", "bad_input", "refused")
    assert charged(site_folder) == []
    update_in(desk.answer(asking.round()))


def test_no_text_of_an_exception_is_told_or_logged(
    desk: Desk, asking: Asking, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class RustPanic(BaseException):
        """As pyo3 raises them."""

    def broken(*_: object) -> None:
        raise RustPanic(SECRET)

    monkeypatch.setattr(cohort, "class_sums", broken)
    with caplog.at_level(logging.DEBUG):
        answer = desk.answer(asking.round())
    assert (answer.code, answer.facts, answer.update) == ("internal", {}, b"")
    assert "in broken" in caplog.text
    assert SECRET not in caplog.text


def test_a_full_disk_under_the_answers_withholds_nothing(
    desk: Desk, asking: Asking, monkeypatch: pytest.MonkeyPatch, site_folder: SiteFolder
) -> None:
    def full(*_: object) -> None:
        raise LedgerUnavailable("disk full")

    monkeypatch.setattr(Answers, "keep", full)
    update_in(desk.answer(asking.round()))
    assert len(charged(site_folder)) == 2
    assert desk.answer(asking.round()).code == "over"


def test_requests_wait_in_line_and_the_line_has_an_end(
    desk: Desk, asking: Asking, monkeypatch: pytest.MonkeyPatch, site_folder: SiteFolder
) -> None:
    """Of one round asked for many times at once, one is computed and all that waited get its bits."""
    begun, go = threading.Event(), threading.Event()
    run, codes = Cohort.run, []

    def slow(self: Cohort, instruction: object) -> object:
        begun.set()
        assert go.wait(60)
        return run(self, instruction)  # type: ignore[arg-type]

    monkeypatch.setattr(Cohort, "run", slow)
    threads = [threading.Thread(target=lambda: codes.append(desk.answer(asking.round()))) for _ in range(LONGEST_LINE)]
    first = threading.Thread(target=lambda: codes.append(desk.answer(asking.round())))
    first.start()
    assert begun.wait(60)
    for thread in threads:
        thread.start()
    while desk._line._value:  # until all of them wait
        pass
    assert desk.answer(asking.round()).code == "busy"
    go.set()
    for thread in (first, *threads):
        thread.join()
    assert len({answer.update for answer in codes}) == 1
    assert len(charged(site_folder)) == 2


def test_a_desk_that_retires_ends_its_round_and_begins_no_other(
    desk: Desk, asking: Asking, monkeypatch: pytest.MonkeyPatch, site_folder: SiteFolder
) -> None:
    run, answers = Cohort.run, []

    def retired_meanwhile(self: Cohort, instruction: RoundInstruction) -> list[ClientUpdate]:
        desk.retire()
        waiting.start()
        return run(self, instruction)

    monkeypatch.setattr(Cohort, "run", retired_meanwhile)
    waiting = threading.Thread(target=lambda: answers.append(desk.answer(asking.round(1))))
    update_in(desk.answer(asking.round(0)))
    waiting.join()
    assert [answer.code for answer in answers] == ["unavailable"]
    assert [row[1] for row in charged(site_folder) if row[2] == "reserved"] == [0]


def test_the_round_is_the_cohorts(
    desk: Desk, asking: Asking, site_folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same secret, the desk's bits are those of a cohort of one over the same records."""
    from fedlora.federation import sites
    from fedlora.federation.shelf import Shelf
    from fedlora.randomness import SecretRoot

    monkeypatch.setattr(sites.SecretRoot, "from_os", lambda: SecretRoot(b"x" * 32))
    answer = update_in(desk.answer(asking.round()))
    config = desk.policy.localised(asking.config)
    data = sites.load_own_data(config, 0, Shelf())
    site = sites.make_site(config, data, asking.workbench.schedule, 0, desk.policy)
    dataset: EncodedDataset = sites.encode_training_data(asking.workbench, data)
    alone = Cohort(workbench=asking.workbench, dataset=dataset, sites=[site], ledger=Ledger.in_memory())
    (update,) = alone.run(wire.decode_instruction(asking.round().instruction))
    assert torch.equal(update.vector, answer.vector)
    assert update.facts == answer.facts


def test_without_a_policy_there_is_no_desk(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefused, match="cannot read the policy"):
        Desk(tmp_path / "site.toml")


def test_status_tells_what_is_spent(desk: Desk, asking: Asking) -> None:
    desk.answer(asking.round())
    desk.answer(asking.under("privacy.epsilon=8").round())
    told = desk.status()
    assert told["answers"] == [
        {"ask": "round", "code": "ok", "count": 1},
        {"ask": "round", "code": "refused", "count": 1},
    ]
    (ward,) = told["data_sets"]
    assert ward["name"] == "ward"
    assert 0 < ward["epsilon_counted"] < 6


@pytest.mark.parametrize("change", ["public_size", "records"])
def test_a_run_is_one_plan(asking: Asking, site_folder: SiteFolder, change: str) -> None:
    """Else the ε that the server is told, that of the plan at hand, would be of rounds that were never done."""
    desk = Desk(site_folder.settings)
    update_in(desk.answer(asking.round(0)))
    update_in(desk.answer(asking.round(1)))
    if change == "public_size":
        site_folder.write_policy(("max_delta = 1e-3", "max_delta = 1e-3\npublic_size = 600"))
    else:
        desk.close()
        site_folder.write_records(count=RECORDS + 30)
        desk = Desk(site_folder.settings)
    rows = charged(site_folder)
    assert desk.answer(asking.round(2)).code == "refused"
    assert desk.answer(asking.round(2)).code == "refused", "nor when asked twice"
    assert charged(site_folder) == rows
    if change == "public_size":
        site_folder.write_policy()
        update_in(desk.answer(asking.round(2)))
    desk.close()


def test_status_tells_of_what_was_spent_under_another_name(asking: Asking, site_folder: SiteFolder) -> None:
    desk = Desk(site_folder.settings)
    update_in(desk.answer(asking.round()))
    site_folder.write_policy(("[data.ward]", "[data.clinic]"))
    clinic, ward = desk.status()["data_sets"]
    assert (clinic["name"], clinic["epsilon_counted"]) == ("clinic", 0)
    assert (ward["name"], ward["max_epsilon"]) == ("ward", None)
    assert 0 < ward["epsilon_counted"] < 6
    desk.close()
