"""The server's side of a run: instruct, collect, average, evaluate. Knows no transport and no private value.

But for one: where clients' whole data are protected and the server is trusted to add the noise (privacy.unit = client,
privacy.client_noise = server), it is sent moves without any.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fedlora.adapters.dam import UpdateProducts
from fedlora.engine.confusion import PrivateEvaluation, estimate_accuracy
from fedlora.engine.gates import LARGEST_GATE_LOGIT
from fedlora.engine.prototypes import prototype_head
from fedlora.errors import FedloraError, ProtocolError
from fedlora.federation.aggregation import aggregate, exact_sum, outlying, told_size
from fedlora.federation.merging import MakeOne, Merged, merge, padded
from fedlora.federation.messages import (
    ClientFailure,
    ClientUpdate,
    Facts,
    RoundInstruction,
    check_update,
    opened_update,
)
from fedlora.federation.module_scores import SearchState
from fedlora.federation.protection import client_level_of, protected_mean
from fedlora.federation.quantisation import wire_dtype
from fedlora.federation.schedule import ScheduledRound
from fedlora.federation.selection import choose_modules, chosen_theta
from fedlora.federation.server_optimizer import ServerOptimizer
from fedlora.federation.workbench import Workbench
from fedlora.privacy.accounting import Charge, epsilon
from fedlora.privacy.client_level import ClientLevel
from fedlora.privacy.mechanisms.granular import released_std
from fedlora.privacy.noise import HostNoise
from fedlora.privacy.phases import ALIGNMENT, BILEVEL, EVALUATION, FINETUNE, PROTOTYPE, TRAINING, WARMUP
from fedlora.privacy.plan import evaluation_phases
from fedlora.randomness import SecretRoot

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float]
Reply = ClientUpdate | ClientFailure


class Transport(Protocol):
    """Carries one round's instruction to clients and their replies back; a silent client is a ClientFailure."""

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]: ...


@dataclass(kw_only=True)
class ServerState:
    """All that the server needs to go on after a stop; nothing in it is secret."""

    run_id: str
    theta: Tensor
    """[P] float32 on the CPU."""
    head: tuple[Tensor, Tensor] | None = None
    next_round: int = 0
    facts: dict[int, Facts] = field(default_factory=dict)
    """The latest public facts of each client."""
    bytes_up: int = 0
    bytes_down: int = 0
    rounds_done: int = 0
    """Whole rounds; fewer than `next_round` where some were given up."""
    last_report: dict[str, Any] | None = None
    """Of the last whole round, as written for people to read."""
    search: SearchState = field(default_factory=SearchState)
    """For the modules to adapt."""
    folded: Tensor | None = None
    """[F] float32, what the base was given beside its own weights; None: nothing."""
    optimizer_state: dict[str, Tensor] = field(default_factory=dict)
    """What `federation.server_optimizer` remembers of earlier rounds."""

    @property
    def chosen(self) -> tuple[bool, ...] | None:
        """The mask that clients are told, once modules are chosen."""
        return None if self.search.selection is None else self.search.selection.mask.chosen


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What is known after a round; everything in it is public."""

    round: int
    phase: str
    metric: float | None
    metrics: Metrics
    epsilon_max: float
    noise_seeded: bool
    bytes_up: int
    bytes_down: int
    seconds: float
    clients_ok: int
    clients_failed: int
    failures: Mapping[int, str]
    private_evaluation: PrivateEvaluation | None = None
    """What a round of evaluation found."""
    choice: str | None = None
    """Which modules were chosen right before the round, in one line."""


@dataclass(kw_only=True)
class Server:
    """Runs the schedule over a transport."""

    workbench: Workbench
    transport: Transport
    evaluate: Callable[[Tensor], Metrics]
    """Metrics of a global theta [P] on public validation data; the first is the headline."""
    on_round: Callable[[RoundReport, ServerState], None]
    """Called after every round with its report and the state to go on from."""
    before_round: Callable[[ScheduledRound], None] = lambda entry: None
    """Called before anyone is asked to do the round."""
    on_choice: Callable[[ServerState], None] = lambda state: None
    """Called when modules are chosen, before anyone is told: a run has one choice, also if it is stopped now."""
    client_level: ClientLevel | None = field(init=False)
    """How clients' whole moves are protected; None where records are, by the sites."""

    def __post_init__(self) -> None:
        self.client_level = client_level_of(self.workbench.config, self.workbench.schedule)

    def run(self, state: ServerState) -> ServerState:
        """All rounds from `state.next_round` on.

        Raises:
            FedloraError: fewer than federation.minimum_clients answered a round, so the run cannot go on. Not so for an
                evaluation: what was trained before it stays good.
        """
        if state.head is not None:
            self.workbench.classifier.set_head(*state.head)
        self.workbench.adopt(state.chosen)
        self.workbench.folded.add(state.folded)
        for entry in self.workbench.schedule[state.next_round :]:
            self.on_round(self._round(entry, state), state)
        return state

    def _round(self, entry: ScheduledRound, state: ServerState) -> RoundReport:
        start = time.perf_counter()
        if entry.phase == FINETUNE and self.workbench.config.adapter.select != "none" and state.chosen is None:
            self._choose(state)
        self.before_round(entry)
        layout = self.workbench.sent_layout(entry)
        instruction = RoundInstruction(
            run_id=state.run_id,
            round_index=entry.index,
            phase=entry.phase,
            layout_digest=layout.digest,
            theta=self._theta(entry, state),
            head=state.head,
            mask=state.chosen,
            folded=state.folded,
        )
        updates, failures = self._sort(self._exchange(instruction, entry), instruction, entry, state.theta)
        if entry.phase != EVALUATION:
            self._require_enough(entry, len(updates), failures)
        evaluation = self._apply(entry, state, instruction.theta, updates)
        state.facts |= self._facts(entry, state, {update.client: update.facts for update in updates})
        up = sum(update.num_bytes for update in updates)
        down = instruction.num_bytes * len(entry.clients)
        state.bytes_up, state.bytes_down, state.next_round = (
            state.bytes_up + up,
            state.bytes_down + down,
            entry.index + 1,
        )
        metrics = self._metrics(entry, state)
        return RoundReport(
            round=entry.index,
            phase=entry.phase,
            metric=next(iter(metrics.values()), None),
            metrics=metrics,
            epsilon_max=max(facts["epsilon"] for facts in state.facts.values()),
            noise_seeded=self.workbench.config.privacy.seeded_noise,
            bytes_up=up,
            bytes_down=down,
            seconds=round(time.perf_counter() - start, 1),
            clients_ok=len(updates),
            clients_failed=len(failures),
            failures=failures,
            private_evaluation=evaluation,
            choice=self._choice(entry, state),
        )

    def _require_enough(self, entry: ScheduledRound, usable: int, failures: Mapping[int, str]) -> None:
        wanted = self.workbench.config.federation.minimum_clients
        if usable < wanted:
            raise FedloraError(
                f"round {entry.index} ({entry.phase}): {usable or 'none'} of {len(entry.clients)} clients answered "
                f"usably ({', '.join(sorted(set(failures.values())))}), wanted at least {wanted}; the clients' own "
                "logs say why"
            )

    def _theta(self, entry: ScheduledRound, state: ServerState) -> Tensor:
        """What the round starts from: all that is not kept by sites, and a bilevel search's gates, whose logits are 0
        at first.
        """
        if entry.phase != BILEVEL:
            return state.theta[self.workbench.layout.positions(self.workbench.shared_parts)]
        gates = state.search.gates
        return torch.cat([state.theta, torch.zeros(len(self.workbench.candidates)) if gates is None else gates])

    def _choice(self, entry: ScheduledRound, state: ServerState) -> str | None:
        """For the report of the round that follows it, also where the run was stopped in between."""
        first = next(planned for planned in self.workbench.schedule if planned.phase == FINETUNE)
        return None if entry != first or state.search.selection is None else str(state.search.selection)

    def _choose(self, state: ServerState) -> None:
        """From all candidates to the chosen modules, once."""
        before = self.workbench.gated
        told = [facts["effective_noise_multiplier"] for facts in state.facts.values() if "phases" in facts]
        selection = choose_modules(self.workbench, state.search, told)
        self.workbench.adopt(selection.mask.chosen)
        state.theta = chosen_theta(self.workbench, state.theta, state.search, before)
        state.search = SearchState(selection=selection)  # the rest has done its work
        self.on_choice(state)

    def _exchange(self, instruction: RoundInstruction, entry: ScheduledRound) -> list[Reply]:
        """Everyone's replies; nobody's where an evaluation is refused as a whole, as clients of one process refuse."""
        try:
            return self.transport.exchange(instruction, entry.clients)
        except FedloraError as error:
            if entry.phase != EVALUATION:
                raise
            logger.warning("the private evaluation was not done: %s", error)
            return [ClientFailure(client, "refused") for client in entry.clients]

    def _facts(self, entry: ScheduledRound, state: ServerState, answered: Mapping[int, Facts]) -> dict[int, Facts]:
        """Facts of every client asked in `entry`. Who did not answer may still have released, and is charged for it."""
        return {
            client: answered.get(client) or charged(client, entry, self.workbench, state.facts.get(client))
            for client in entry.clients
        }

    def _sort(
        self, replies: list[Reply], instruction: RoundInstruction, entry: ScheduledRound, theta: Tensor
    ) -> tuple[list[ClientUpdate], dict[int, str]]:
        """Usable updates, one per asked client, and a code for everyone else."""
        updates: dict[int, ClientUpdate] = {}
        failures = dict.fromkeys(entry.clients, "no_reply")
        for reply in replies:
            if reply.client not in failures or reply.client in updates:
                continue  # not asked, or a second answer
            if isinstance(reply, ClientFailure):
                failures[reply.client] = reply.code
                continue
            try:
                update = self._opened(reply, instruction, entry)
                if entry.phase in TRAINING and self.workbench.config.federation.weights == "public_size":
                    told_size(update)
                _check_told_noise(update, self.client_level)
            except ProtocolError as error:
                logger.warning("%s", error)
                failures[reply.client] = "protocol"
            else:
                updates[update.client] = update
        if entry.phase in TRAINING and self.client_level is None:  # else one client's share would depend on another's
            for client, why in self._outlying([*updates.values()], instruction, entry, theta).items():
                logger.warning("client %d left out of round %d: %s", client, entry.index, why)
                del updates[client]
                failures[client] = "outlier"
        return list(updates.values()), {client: code for client, code in failures.items() if client not in updates}

    def _opened(self, reply: ClientUpdate, instruction: RoundInstruction, entry: ScheduledRound) -> ClientUpdate:
        """The reply with its vector, however that travelled, once it has passed the gate."""
        bench = self.workbench
        layout, start = bench.sent_layout(entry, reply.client), bench.moved_from(instruction.theta, entry, reply.client)
        update = opened_update(reply, start, layout, wire_dtype(bench.config, entry.phase))
        check_update(update, instruction, layout)
        return update

    def _outlying(
        self, updates: Sequence[ClientUpdate], instruction: RoundInstruction, entry: ScheduledRound, theta: Tensor
    ) -> dict[int, str]:
        if not entry.turns:
            return outlying(updates, instruction.theta, self.workbench.layout.size)
        whole = [replace(update, vector=padded(self.workbench, entry, update, theta)) for update in updates]
        return outlying(whole, theta, self.workbench.layout.size)

    def _apply(
        self, entry: ScheduledRound, state: ServerState, start: Tensor, updates: Sequence[ClientUpdate]
    ) -> PrivateEvaluation | None:
        """Put what came back into `state`; an evaluation leaves it alone and returns what was found."""
        search = state.search
        if entry.phase == EVALUATION:
            return evaluated(self.workbench, updates)
        if entry.phase == ALIGNMENT:
            search.scores, search.scored = exact_sum(updates), len(updates)
            return None
        if entry.phase == WARMUP:
            search.products = search.products or UpdateProducts.empty(self.workbench.layout, self.workbench.candidates)
            for update in sorted(updates, key=lambda update: update.client):  # sums do not depend on who came first
                search.products.add(update.vector - state.theta)
        if entry.phase == FINETUNE:
            self._merge(entry, state, updates)
            return None
        reached = aggregate(updates, None if entry.phase == PROTOTYPE else start, self.workbench.config.federation)
        if entry.phase == PROTOTYPE:
            layout = self.workbench.payload_layout(PROTOTYPE)
            state.head = prototype_head(reached, layout, self.workbench.config.model.temperature)
            self.workbench.classifier.set_head(*state.head)
        elif entry.phase == BILEVEL:
            theta, gates = reached.split([len(state.theta), len(self.workbench.candidates)])
            state.theta, search.gates = theta.clone(), gates.clamp(-LARGEST_GATE_LOGIT, LARGEST_GATE_LOGIT)
        else:
            state.theta = reached
        return None

    def _merge(self, entry: ScheduledRound, state: ServerState, updates: Sequence[ClientUpdate]) -> None:
        optimizer = ServerOptimizer(self.workbench.config.federation)
        optimizer.restore(state.optimizer_state)
        before = Merged(state.theta, state.folded)
        merged = merge(self.workbench, entry, before, updates, optimizer, self._make_one(entry))
        state.theta, state.folded, state.optimizer_state = merged.theta, merged.folded, optimizer.state()
        self.workbench.folded.add(state.folded)

    def _make_one(self, entry: ScheduledRound) -> MakeOne:
        config, how = self.workbench.config, self.client_level
        if how is None:
            return partial(aggregate, config=config.federation)
        # A new key for every release, kept nowhere: a round that is done anew has other noise.
        root = SecretRoot.seeded(config.run.seed) if config.privacy.seeded_noise else SecretRoot.from_os()
        noise = HostNoise(root.numpy("client-level noise", entry.index))
        return partial(protected_mean, how, noise=noise)

    def _metrics(self, entry: ScheduledRound, state: ServerState) -> Metrics:
        if entry.phase in (EVALUATION, ALIGNMENT, BILEVEL):
            return {}  # nothing has changed since the last round of training, or only together with gates
        last = not any(later.phase == FINETUNE for later in self.workbench.schedule[entry.index + 1 :])
        due = entry.phase == PROTOTYPE or (entry.index + 1) % self.workbench.config.run.evaluate_every == 0
        return self.evaluate(state.theta) if due or last else {}


def evaluated(workbench: Workbench, updates: Sequence[ClientUpdate]) -> PrivateEvaluation:
    """What the noised counts of those who answered say together; no clipping, no weights, nothing private."""
    layout = workbench.payload_layout(EVALUATION)
    (phase,) = evaluation_phases(workbench.config)
    total = exact_sum(updates) if updates else torch.zeros(layout.size, dtype=torch.float64)
    of_one = released_std(
        noise_multiplier=phase.mechanism.noise_multiplier, sensitivity=phase.sensitivity, size=layout.size
    )
    return estimate_accuracy(
        layout.view(total, layout.slots[0]),
        noise_std=of_one * math.sqrt(len(updates)),
        clients=len(updates),
    )


def initial_state(workbench: Workbench, run_id: str) -> ServerState:
    workbench.adopt(None)  # it may have done another run
    return ServerState(run_id=run_id, theta=workbench.initial_theta.to("cpu", torch.float32))


def _check_told_noise(update: ClientUpdate, how: ClientLevel | None) -> None:
    """What clients say they are charged is what will be printed: never for more noise than is added.

    Raises:
        ProtocolError: the client counts on more.
    """
    if how is not None and not update.facts["effective_noise_multiplier"] <= how.noise_multiplier:
        raise ProtocolError(
            f"client {update.client} is charged for more noise than this run adds to the clients' moves; its site runs "
            "other code or other settings"
        )


def charged(client: int, entry: ScheduledRound, workbench: Workbench, known: Facts | None) -> Facts:
    """Facts of a silent client as if it had done all rounds up to `entry`; the asked ε where it never said its own."""
    config = workbench.config
    done = [past for past in workbench.schedule[: entry.index + 1] if client in past.clients]
    steps: dict[str, int] = {}
    for past in done:
        released = 1 if config.privacy.unit == "client" else past.num_steps
        steps[past.phase] = steps.get(past.phase, 0) + released
    if known is None or "phases" not in known:
        bound = {"epsilon": config.privacy.epsilon, "delta": config.privacy.delta}
        return {"client": client, "accountant": config.privacy.accountant, "num_steps": steps.get(FINETUNE, 0)} | bound
    phases = [{**phase, "num_steps": steps.get(phase["name"], 0)} for phase in known["phases"]]
    charges = [
        Charge(phase["sampling_probability"], phase["effective_noise_multiplier"], phase["num_steps"])
        for phase in phases
    ]
    spent = epsilon(charges, known["delta"], known["accountant"])
    return {**known, "phases": phases, "num_steps": steps.get(FINETUNE, 0), "epsilon": spent}
