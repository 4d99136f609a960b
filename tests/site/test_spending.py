"""No sequence of requests, restarts, lost files and edits of the policy gets more out of a site than was charged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fedlora.federation import cohort, wire
from fedlora.federation.cohort import Cohort
from fedlora.privacy.accounting import epsilon
from fedlora.privacy.ledger import DataSet, Entry, Ledger
from fedlora.site.desk import Desk
from fedlora.site.protocol import Answer, Request
from tests.site.conftest import Asking, SiteFolder, update_in

DELTA = 1e-3
"""The policy's."""
CAPS = (3.0, 6.0, 9.0)


@pytest.fixture
def desk(site_folder: SiteFolder) -> Any:
    opened = Desk(site_folder.settings)
    yield opened
    opened.close()


@dataclass(frozen=True)
class Given:
    """What was answered to the first who asked for a round."""

    question: Request
    answer: Answer


class Courier(RuleBasedStateMachine):
    """Asks whatever it likes, while the site's owner edits, loses files and starts the daemon anew."""

    folder: SiteFolder
    runs: list[Asking]

    def __init__(self) -> None:
        super().__init__()
        for path in self.folder.path.glob("*.sqlite*"):
            path.unlink()
        self.cap, self.largest_cap, self.given = 6.0, 6.0, dict[tuple[str, int], Given]()
        self.readable = True
        self.folder.write_policy()
        self.desk = Desk(self.folder.settings)

    def teardown(self) -> None:
        self.desk.close()

    # What the courier does ---------------------------------------------------------------------------------------

    @rule(
        run=st.integers(0, 3),
        number=st.integers(0, 2),
        index=st.integers(0, 3),
        theta=st.sampled_from((0.0, 0.0, 0.1)),
        client=st.sampled_from((0, 0, 1, 2)),
    )
    def ask(self, run: int, number: int, index: int, theta: float, client: int) -> None:
        asking = self.runs[run]
        run_id = f"{asking.run_id[:-1]}{number}"
        self._ask(asking.round(index, theta=theta, client=client, run_id=run_id), (run_id, index))

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.given)))
        self._ask(self.given[key].question, key)

    @rule(run=st.integers(0, 3), other=st.integers(0, 3))
    def ask_with_the_id_of_another_configuration(self, run: int, other: int) -> None:
        if run != other:
            asked = replace(self.runs[run], run_id=self.runs[other].run_id).round(0)
            assert self.desk.answer(asked).code in ("protocol", "refused")

    @rule(run=st.integers(0, 3), theta=st.sampled_from((11.0, -1e30)))
    def ask_out_of_range(self, run: int, theta: float) -> None:
        assert self.desk.answer(self.runs[run].round(0, theta=theta)).code in ("protocol", "over", "refused")

    @rule(run=st.integers(0, 3))
    def enrol(self, run: int) -> None:
        assert self.desk.answer(self.runs[run].enrol()).code in (("ok",) if self.readable else ("refused",))

    @rule(run=st.integers(0, 3))
    def ask_while_the_engine_is_broken(self, run: int) -> None:
        """What is charged by then is spent, and nothing leaves."""
        sound = cohort.class_sums
        cohort.class_sums = lambda *_: 1 / 0
        try:
            asking = self.runs[run]
            fresh = replace(asking, run_id=f"{asking.run_id[:-1]}9")
            assert self.desk.answer(fresh.round(0)).update == b""
        finally:
            cohort.class_sums = sound

    # What the owner does -----------------------------------------------------------------------------------------

    @rule(cap=st.sampled_from(CAPS))
    def set_the_cap(self, cap: float) -> None:
        self.cap, self.largest_cap = cap, max(cap, self.largest_cap)
        self.readable = True
        self.folder.write_policy(("max_epsilon = 6.0", f"max_epsilon = {cap}"))

    @rule()
    def break_the_policy(self) -> None:
        self.readable = False
        self.folder.settings.write_text("[site")

    @precondition(lambda self: self.readable)
    @rule(forgets=st.booleans())
    def start_anew(self, forgets: bool) -> None:
        self.desk.close()
        if forgets:
            (self.folder.path / "answers.sqlite").unlink()
        self.desk = Desk(self.folder.settings)

    # What has to hold --------------------------------------------------------------------------------------------

    def _ask(self, question: Request, key: tuple[str, int]) -> None:
        before, known = self._charges(), self.given.get(key)
        answer = self.desk.answer(question)
        fresh = self._charges()[len(before) :]
        assert answer.facts == {}
        if not self.readable:
            assert answer.code == "refused"
        if answer.code != "ok":
            assert answer.update == b""
            assert fresh == []
            return
        if known is not None:
            assert _content(question) == _content(known.question), "another question has an answer, too"
            assert answer == known.answer, "two answers for one charge"
            assert fresh == []
            return
        (row,) = fresh
        update = update_in(answer)
        (phase,) = [phase for phase in update.facts["phases"] if phase["name"] == update.phase]
        assert (row.run, row.round) == key == (update.run_id, update.round_index)
        assert row.noise_multiplier == phase["effective_noise_multiplier"] >= 0.3
        assert row.sampling_probability == phase["sampling_probability"]
        assert self._spent() <= self.cap
        self.given[key] = Given(question, answer)

    @invariant()
    def every_answer_has_a_charge_of_its_own(self) -> None:
        charged = [(entry.run, entry.round) for entry in self._charges()]
        assert len(set(charged)) == len(charged)
        assert self.given.keys() <= set(charged)
        assert len({given.answer.update for given in self.given.values()}) == len(self.given)

    @invariant()
    def no_more_is_spent_than_was_ever_allowed(self) -> None:
        assert self._spent() <= self.largest_cap

    def _charges(self) -> list[Entry]:
        return [entry for entry in self._ledger(Ledger.entries) if entry.kind == "reserved"]

    def _spent(self) -> float:
        charges = self._ledger(lambda ledger: ledger.charges(DataSet(fingerprint="", name="ward")))
        return epsilon(charges, DELTA, "pld") if charges else 0.0

    def _ledger(self, look: Callable[[Ledger], Any]) -> Any:
        ledger = Ledger.read(self.folder.path / "ledger.sqlite")
        try:
            return look(ledger)
        finally:
            ledger.close()


def _content(question: Request) -> tuple[object, ...]:
    """Equal instructions may differ in their bytes: the metadata of a safetensors blob have no order."""
    return question.client, dict(question.config), wire.decode_instruction(question.instruction).digest


def played(folder: SiteFolder, asking: Asking, *, examples: int, steps: int) -> None:
    cheap = "privacy.epsilon=1.5", "privacy.prototype_noise_multiplier=60"
    runs = [asking.under(*cheap), asking.under(*cheap, "training.learning_rate=1"), asking, asking.under(*cheap[:1])]
    machine = type("OneSite", (Courier,), {"folder": folder, "runs": runs})
    how = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=how)  # type: ignore[no-untyped-call]


def test_no_sequence_gets_more_than_it_is_charged_for(site_folder: SiteFolder, asking: Asking) -> None:
    played(site_folder, asking, examples=4, steps=20)


@pytest.mark.slow
def test_no_long_sequence_does_either(site_folder: SiteFolder, asking: Asking) -> None:
    played(site_folder, asking, examples=15, steps=40)


def test_the_end_of_one_run_is_not_the_end_of_another(asking: Asking, site_folder: SiteFolder) -> None:
    """A question for a run whose answers are lost is refused, and leaves the next run as it was."""
    site_folder.write_policy(("max_epsilon = 6.0", "max_epsilon = 60.0"))
    first = Desk(site_folder.settings)
    update_in(first.answer(asking.round(0)))
    first.close()
    (site_folder.path / "answers.sqlite").unlink()
    second = Desk(site_folder.settings)
    assert second.answer(asking.round(0)).code == "over"
    update_in(second.answer(asking.round(0, run_id=f"{asking.run_id[:-1]}1")))
    second.close()


def test_what_was_passed_over_stays_so_though_answers_are_lost(asking: Asking, site_folder: SiteFolder) -> None:
    """The ledger has no row of round 1: that it is over follows from the row of round 2."""
    first = Desk(site_folder.settings)
    for index in (0, 2):
        update_in(first.answer(asking.round(index)))
    first.close()
    (site_folder.path / "answers.sqlite").unlink()
    second = Desk(site_folder.settings)
    assert [second.answer(asking.round(index)).code for index in (1, 2)] == ["over", "over"]
    update_in(second.answer(asking.round(3)))
    second.close()


def test_what_egress_refuses_does_not_leave(
    desk: Desk, asking: Asking, site_folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number more than agreed: it is charged, since it was computed, and stays."""
    monkeypatch.setattr(Cohort, "_class_sums", lambda self, site, entry: torch.zeros(10_000, dtype=torch.float64))
    monkeypatch.setattr(Cohort, "_release", _without_noise)
    answer = desk.answer(asking.round())
    assert (answer.code, answer.update) == ("protocol", b"")
    monkeypatch.undo()
    assert desk.answer(asking.round()).code == "over"


def _without_noise(self: Cohort, sums: Any, entry: Any) -> list[Any]:
    return [sums(site, entry).float() for site in self.sites]
