"""The data owner's side of every request: policy, then what was answered before, then the same round as everywhere.

One round at a time: the device and the base model are shared, whatever the data set. Whoever asks meanwhile waits in
line; the line has an end.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig
from fedlora.errors import FedloraError, LedgerBroken, LedgerUnavailable, PolicyRefused, ProtocolError
from fedlora.federation import memory, wire
from fedlora.federation.cohort import Cohort
from fedlora.federation.failures import failure_code, log_failure
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.federation.prefixes import prefix_cache
from fedlora.federation.schedule import make_schedule
from fedlora.federation.shelf import Shelf
from fedlora.federation.site import Site
from fedlora.federation.sites import load_own_data, localised, make_site
from fedlora.federation.workbench import build_workbench
from fedlora.privacy.accounting import Charge, epsilon
from fedlora.privacy.ledger import DataSet, Ledger
from fedlora.privacy.policy import SitePolicy
from fedlora.provenance import code_digest, versions
from fedlora.site.answers import Answers, KeptAnswer
from fedlora.site.health import health
from fedlora.site.personal import export_personal
from fedlora.site.protocol import Answer, Request

LONGEST_LINE = 8
"""Requests that wait for the one at work; more are told to come back."""

log = logging.getLogger("fedlora.site")


@dataclass(kw_only=True)
class _Seat:
    """One run's site at work; another run, or a change of the policy, takes its place."""

    asker: str
    """Digest of the configuration, and which client the site is."""
    policy: SitePolicy
    cohort: Cohort

    @property
    def site(self) -> Site:
        (site,) = self.cohort.sites
        return site


class Desk:
    """Answers what couriers bring. Holds records, base model, policy, ledger and secrets; none of them leaves it.

    The policy is read anew for every request, so that an edit counts at once; a broken one refuses everything. Its
    sections [site] and [tls] are those of the start.
    """

    def __init__(self, settings: Path) -> None:
        """Open what the policy at `settings` names.

        Raises:
            PolicyRefused: the policy cannot be used.
            LedgerUnavailable, LedgerBroken: the ledger or the kept answers cannot be.
        """
        self.policy = SitePolicy.from_toml(settings)
        self._ledger = Ledger.open(self.policy.ledger)
        self._answers = Answers.open(self.policy.beside(self.policy.site.answers))
        self._shelf, self._shelf_policy = Shelf(), self.policy
        self._seat: _Seat | None = None
        self._turn = threading.Lock()
        self._line = threading.BoundedSemaphore(LONGEST_LINE + 1)
        self._retiring = False
        self._tally: Counter[tuple[str, str]] = Counter()

    def retire(self) -> None:
        """Begin nothing more. The round at work is ended; whoever waits in line is told to come back."""
        self._retiring = True

    def close(self) -> None:
        """Wait for the round at work, then let go of everything."""
        with self._turn:
            self._clear()
            self._answers.close()
            self._ledger.close()

    def answer(self, request: Request) -> Answer:
        """The answer to a request to enrol or for a round; whatever goes wrong is a code, and the log says why."""
        if not self._line.acquire(blocking=False):
            answer = Answer(code="busy")
        else:
            try:
                with self._turn:
                    answer = self._answer(request)
            except BaseException as error:  # a panic in a Rust extension is no Exception, and may quote its input too
                log_failure(log, error, {"ask": request.ask, "client": request.client})
                answer = Answer(code=failure_code(error))
            finally:
                self._line.release()
        self._tally[request.ask, answer.code] += 1
        return answer

    def status(self) -> dict[str, Any]:
        """For the site's owner: what is spent, of what, and how requests were answered since the start."""
        try:
            policy = self._policy_now()
        except PolicyRefused:
            policy = self.policy
        data_sets: list[dict[str, Any]] = [
            {
                "name": name,
                "task": data.task,
                "epsilon_counted": self._counted(name, data.max_delta),
                "max_epsilon": data.max_epsilon,
                "max_delta": data.max_delta,
            }
            for name, data in policy.data.items()
        ]
        data_sets += [
            {
                "name": name,
                "task": "",
                "epsilon_counted": self._counted(name, data_sets[0]["max_delta"]),
                "max_epsilon": None,  # the policy does not name it; under another name its records may still count
                "max_delta": data_sets[0]["max_delta"],
            }
            for name in sorted(self._names() - policy.data.keys())
        ]
        return {
            "fedlora_version": versions(("fedlora",))["fedlora"],
            "health": health(policy) or "ok",
            "at_work": self._turn.locked(),
            "answers": [
                {"ask": ask, "code": code, "count": count} for (ask, code), count in sorted(self._tally.items())
            ],
            "data_sets": data_sets,
        }

    def _names(self) -> set[str]:
        try:
            return self._ledger.names()
        except (LedgerUnavailable, LedgerBroken):
            return set()

    def _counted(self, name: str, delta: float) -> float | None:
        """ε of all that was ever charged to the data set; None where its ledger cannot be read."""
        try:
            return epsilon(self._ledger.charges(DataSet(fingerprint="", name=name)), delta, "pld")
        except (LedgerUnavailable, LedgerBroken):
            return None

    def _policy_now(self) -> SitePolicy:
        """What the file says at this moment, with [site] and [tls] as they were at the start.

        Raises:
            PolicyRefused: it cannot be used.
        """
        return replace(SitePolicy.from_toml(self.policy.path), site=self.policy.site, tls=self.policy.tls)

    def _answer(self, request: Request) -> Answer:
        if self._retiring:
            return Answer(code="unavailable")
        return self._enrol(request) if request.ask == "enrol" else self._round(request)

    def _enrol(self, request: Request) -> Answer:
        """Whether the site would take part, found out with records and model at hand. Charges nothing."""
        config, policy = self._asked(request)
        self._seat_for(config, request, policy)
        known = {"client": request.client, "task": config.data.task, "configuration": config.digest()[:16]}
        log.info("enrolled", extra=known)
        return Answer(facts={"client": request.client, "code_digest": code_digest()})

    def _round(self, request: Request) -> Answer:
        """One round; or the answer given before, where the question is the very same."""
        config, policy = self._asked(request)
        instruction = wire.decode_instruction(request.instruction)
        _check_run(config, instruction)
        data_set, _ = policy.data_set(config.data.task)
        asked = _digest(config, request, instruction)
        kept = self._answers.last(data_set, instruction.run_id)
        if kept is not None and kept.asked == asked and kept.update is not None:
            log.info("answered as before", extra=_public(instruction))
            return Answer(update=kept.update)
        seat = self._seat_in_run(config, request, policy, instruction, kept)
        before, update = seat.site.next_round, None
        try:
            (made,) = seat.cohort.run(instruction)
            update = wire.encode_update(made)
        finally:
            if seat.site.next_round != before:  # admitted, so it is spent, whatever came of it
                self._keep(data_set, instruction, asked, update, seat.site)
        self._export(seat, instruction, made)
        log.info("answered", extra=_public(instruction))  # not how long it took: a batch's size is private and shows
        return Answer(update=update)

    def _export(self, seat: _Seat, instruction: RoundInstruction, made: ClientUpdate) -> None:
        """Leave the site's own model where it has one. The round is answered whatever becomes of that."""
        try:
            path = export_personal(self.policy.beside("personal"), seat.cohort, instruction, made)
        except (FedloraError, OSError) as error:
            log_failure(log, error)
        else:
            if path is not None:
                log.info("own model exported", extra={**_public(instruction), "folder": str(path)})

    def _asked(self, request: Request) -> tuple[RunConfig, SitePolicy]:
        """The run's configuration, and the policy that allows it.

        Raises:
            ConfigError: it is none.
            PolicyRefused: by what the configuration alone tells.
        """
        config = RunConfig.from_flower(request.config)
        if request.client >= config.federation.clients:
            raise ProtocolError(f"client {request.client} of a run with {config.federation.clients} clients")
        policy = self._policy_now()
        policy.check_config(config)
        return config, policy

    def _seat_in_run(
        self,
        config: RunConfig,
        request: Request,
        policy: SitePolicy,
        instruction: RoundInstruction,
        kept: KeptAnswer | None,
    ) -> _Seat:
        """This site as it stands in the instruction's run: what was done before is over, by memory and by ledger."""
        seat = self._seat_for(config, request, policy)
        if seat.site.run_id not in (None, instruction.run_id):
            self._clear()
            seat = self._seat_for(config, request, policy)
        if seat.site.run_id is None:
            if kept is not None:
                memory.recall(seat.site, kept.memory)
            charged = self._ledger.charges_of_run(instruction.run_id)
            if charged:  # also where no answer of it is kept
                seat.site.run_id, seat.site.next_round = instruction.run_id, max(seat.site.next_round, max(charged) + 1)
                if kept is None and seat.cohort.workbench.method.local:
                    log.warning(
                        "what this site had kept of the run is lost, and starts anew", extra=_public(instruction)
                    )
            try:
                _check_plan(seat.site, charged)
            except PolicyRefused:
                self._clear()  # or the next question would find it at hand
                raise
        return seat

    def _seat_for(self, config: RunConfig, request: Request, policy: SitePolicy) -> _Seat:
        """Records, model and plan for `config`: at hand, or made ready once the policy agrees to all of them."""
        asker, seat = _asker(config, request), self._seat
        if seat is not None and (seat.asker, seat.policy) == (asker, policy):
            return seat
        self._clear()
        if self._shelf_policy != policy:  # what lies there was looked at under another
            self._shelf, self._shelf_policy = Shelf(), policy
        config = localised(config, policy)
        data = load_own_data(config, request.client, self._shelf)
        site = make_site(config, data, make_schedule(config), request.client, policy)
        workbench = build_workbench(config, self._shelf)
        dataset = self._shelf.encoded(config, "train", workbench.classifier)
        cohort = Cohort(
            workbench=workbench,
            dataset=dataset,
            sites=[site],
            ledger=self._ledger,
            prefixes=prefix_cache(workbench, dataset, [site]),
        )
        self._seat = _Seat(asker=asker, policy=policy, cohort=cohort)
        return self._seat

    def _clear(self) -> None:
        """Give the base model back; the site's secrets go for good."""
        if self._seat is not None:
            self._seat.cohort.workbench.detach()
            self._seat = None

    def _keep(self, data_set: str, instruction: RoundInstruction, asked: str, update: bytes | None, site: Site) -> None:
        """Keep what was released. A full disk is no reason to withhold what is charged already: it may go, once."""
        kept = KeptAnswer(round_index=instruction.round_index, asked=asked, update=update, memory=memory.remember(site))
        try:
            self._answers.keep(data_set, instruction.run_id, kept)
        except LedgerUnavailable as error:
            log_failure(log, error)


def _check_plan(site: Site, charged: Mapping[int, Charge]) -> None:
    """One plan for a whole run: the ε that is told for it is that of the plan at hand.

    Raises:
        PolicyRefused: a round of it was charged otherwise than it would be today.
    """
    planned = dict(zip((entry.index for entry in site.schedule), site.planned_charges(), strict=True))
    for index, charge in charged.items():
        if planned.get(index) != charge:
            raise PolicyRefused(
                f"round {index} of this run was charged under another plan: the number of records, public_size or the "
                "node's partition-id has changed since. Put it back as it was, or let a new run begin",
                rule="plan",
            )


def _check_run(config: RunConfig, instruction: RoundInstruction) -> None:
    """A run's id begins with the digest of its configuration, so that one run is one configuration at every site.

    Raises:
        ProtocolError: this one does not.
    """
    if not instruction.run_id.startswith(f"{config.digest()[:16]}-"):
        raise ProtocolError(
            f"run {instruction.run_id} began with another configuration than the one it is asked with, "
            f"{config.digest()[:16]}; server and site run different configurations"
        )


def _public(instruction: RoundInstruction) -> dict[str, str | int]:
    """What a log may say of a round."""
    return {"run": instruction.run_id, "round": instruction.round_index, "phase": instruction.phase}


def _asker(config: RunConfig, request: Request) -> str:
    return f"{config.digest()}/{request.client}"


def _digest(config: RunConfig, request: Request, instruction: RoundInstruction) -> str:
    """Of the question: the very same one has the very same answer."""
    return hashlib.sha256(f"{_asker(config, request)}/{instruction.digest}".encode()).hexdigest()
