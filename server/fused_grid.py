"""A Flower Grid whose nodes are the clients of a simulation in this process: Flower's own strategies over fused rounds.

All messages pushed together are one engine call. What the strategy decides is what becomes of the noised slots; which
rounds there are, what each does and what it may cost was decided before, by the run's configuration, and each client
still does each of its rounds once, in order, charged to the ledger first.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset
from fedlora.errors import ConfigError, FedloraError, ProtocolError
from fedlora.experiments.run_folder import to_json
from fedlora.experiments.simulate import CohortTransport, resolve
from fedlora.federation.evaluator import Evaluator
from fedlora.federation.failures import failure_code
from fedlora.federation.merging import padded
from fedlora.federation.messages import ClientUpdate, Facts, RoundInstruction
from fedlora.federation.prefixes import prefix_cache
from fedlora.federation.schedule import ScheduledRound, make_schedule
from fedlora.federation.server import Reply, Server, Transport, charged, initial_state
from fedlora.federation.shelf import Shelf
from fedlora.federation.site import Site
from fedlora.federation.sites import load_simulated_data, make_sites
from fedlora.federation.workbench import Workbench, build_workbench
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.phases import FINETUNE
from server.slot_arrays import from_arrays, to_arrays

_FIRST_NODE = 2
"""Node of client 0. Node 1 is Flower's server."""
_AVERAGED = ("ffa", "rolora", "la_lora", "lora", "fed_sb")
"""Methods whose server averages what it gets; the others' do more than a strategy of Flower's knows of."""
_UNKNOWN_ERROR = 0
"""Flower's ErrorCode.UNKNOWN."""
_METRICS = (
    "epsilon",
    "delta",
    "noise_multiplier",
    "effective_noise_multiplier",
    "sampling_probability",
    "num_steps",
)
"""Facts that are numbers, and the same kind of number for every client."""


@dataclass(kw_only=True)
class FusedGrid(Grid):
    """The clients of one run, to be asked by one strategy."""

    workbench: Workbench
    transport: CohortTransport
    """All of those asked answer, or it raises."""
    sites: Sequence[Site]
    evaluator: Evaluator
    first: RoundInstruction
    """Of the fine-tuning: where every run with this configuration begins."""
    facts: dict[int, Facts] = field(default_factory=dict)
    """The latest public facts of each client. Who was left out of a round is charged for it, as in every run."""
    _replies: dict[str, Message] = field(default_factory=dict)
    _run: Run | None = None

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig, shelf: Shelf | None = None) -> Iterator[Self]:
        """The clients of `config`, with the prototype head, where it wants one, released and sent already.

        No policy is asked and the ledger is in memory, so this is for simulations: of budgets that outlive the process
        `fedlora simulate --policy` keeps account. The base model is given back as it was.

        Args:
            config: of the run; `federation.rounds` says how many rounds a strategy can ask for.
            shelf: with what this run has in common with others of this process.

        Raises:
            ConfigError: it wants of the server what strategies of Flower's do not do.
            InputError: anything else that the user can correct.
            PrivacyError: the asked ε cannot be met.
        """
        _check_left_to_strategy(config)
        _identify()
        shelf = shelf or Shelf()
        data = load_simulated_data(config, shelf)
        sites = make_sites(config, data, make_schedule(config))
        workbench = build_workbench(resolve(config), shelf)
        try:
            dataset = shelf.encoded(config, "train", workbench.classifier)
            with closing(Ledger.in_memory()) as ledger:
                transport = _transport(workbench, dataset, sites, ledger)
                yield cls(
                    workbench=workbench,
                    transport=transport,
                    sites=sites,
                    evaluator=Evaluator(workbench, shelf),
                    first=_up_to_finetuning(workbench, transport),
                )
        finally:
            workbench.detach()

    @property
    def initial_arrays(self) -> ArrayRecord:
        """For `Strategy.start`: the slots as every run with this configuration begins."""
        return to_arrays(self.first.theta, self.workbench.layout)

    @property
    def num_rounds(self) -> int:
        """For `Strategy.start`: how many rounds are planned, and paid for by the noise."""
        return sum(entry.phase == FINETUNE for entry in self.workbench.schedule)

    # Flower's Grid ------------------------------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        return self._run or Run.create_empty(TaskIdentity.run_id)

    def set_run(self, run: Run) -> None:
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Nodes of the clients that the public schedule has in the next round; of all, once there is none."""
        entry = self._next_round()
        clients = [site.client for site in self.sites] if entry is None else entry.clients
        return [client + _FIRST_NODE for client in clients]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Do what `messages` ask, together. Whatever is refused has an error for a reply that says why."""
        pushed = list(messages)
        by_kind: dict[str, list[Message]] = {}
        for message in pushed:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())  # as Flower's own grids give them
            by_kind.setdefault(message.metadata.message_type, []).append(message)
        answers = {MessageType.TRAIN: self._train, MessageType.EVALUATE: self._evaluate}
        for kind, asked in by_kind.items():
            replies = (
                answers[kind](asked)
                if kind in answers
                else _refused(asked, f"a message of type {kind}, wanted {' or '.join(answers)}")
            )
            self._replies |= {reply.metadata.reply_to_message_id: reply for reply in replies}
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(identifier) for identifier in message_ids if identifier in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies; they are computed in this call, so that there is nothing to wait for until `timeout`."""
        return self.pull_messages(self.push_messages(messages))

    # Rounds -------------------------------------------------------------------------------------------------------

    def _next_round(self) -> ScheduledRound | None:
        done = max(site.next_round for site in self.sites)
        return next((entry for entry in self.workbench.schedule[done:] if entry.phase == FINETUNE), None)

    def _train(self, messages: Sequence[Message]) -> list[Message]:
        entry = self._next_round()
        if entry is None:
            return _refused(
                messages,
                f"all {self.num_rounds} planned rounds of fine-tuning are done, and the noise was chosen for no more; "
                "set federation.rounds for more of them",
            )
        asked: dict[int, Message] = {}
        replies: list[Message] = []
        for message in messages:
            client = message.metadata.dst_node_id - _FIRST_NODE
            if client not in entry.clients:
                why = f"node {client + _FIRST_NODE} is not in round {entry.index} of the public schedule; "
                replies += _refused([message], why + "ask the nodes of get_node_ids()")
            elif client in asked:
                replies += _refused([message], f"a second message to node {client + _FIRST_NODE} in one round")
            else:
                asked[client] = message
        if not asked:
            return replies
        try:
            theta = self._common_theta(asked.values())
            updates = self._ask(entry, theta, tuple(sorted(asked)))
        except FedloraError as error:
            return replies + _refused(asked.values(), f"{failure_code(error)}: {error}")
        return replies + [
            Message(self._told(entry, theta, updates[client]), reply_to=message) for client, message in asked.items()
        ]

    def _ask(self, entry: ScheduledRound, theta: Tensor, clients: tuple[int, ...]) -> dict[int, ClientUpdate]:
        layout = self.workbench.sent_layout(entry)
        instruction = replace(self.first, round_index=entry.index, theta=theta, layout_digest=layout.digest)
        replies = self.transport.exchange(instruction, clients)
        updates = {reply.client: reply for reply in replies if isinstance(reply, ClientUpdate)}
        answered = {client: update.facts for client, update in updates.items()}
        for client in entry.clients:
            self.facts[client] = answered.get(client) or charged(client, entry, self.workbench, self.facts.get(client))
        return updates

    def _told(self, entry: ScheduledRound, theta: Tensor, update: ClientUpdate) -> RecordDict:
        """The global slots as this client would have them, and what it says of its guarantee."""
        whole = padded(self.workbench, entry, update, theta)  # what nobody trains in this round stays as it was
        size = {"num-examples": update.facts["num_examples"]} if "num_examples" in update.facts else {}
        metrics = {name.replace("_", "-"): update.facts[name] for name in _METRICS}
        return RecordDict(
            {
                "arrays": to_arrays(whole, self.workbench.layout),
                "metrics": MetricRecord({"weight": 1.0, **size, **metrics}),
                "facts": ConfigRecord({"json": json.dumps(to_json(update.facts))}),
            }
        )

    def _evaluate(self, messages: Sequence[Message]) -> list[Message]:
        """Metrics on public validation data, the same for every node: no private record is looked at."""
        try:
            found = self.evaluator(self._common_theta(messages))
        except FedloraError as error:
            return _refused(messages, f"{failure_code(error)}: {error}")
        size = sum(len(dataset) for dataset in self.evaluator.splits.values())
        return [
            Message(
                RecordDict({"metrics": MetricRecord({"weight": 1.0, "num-examples": size, **found})}), reply_to=message
            )
            for message in messages
        ]

    def _common_theta(self, messages: Collection[Message]) -> Tensor:
        """The global state [P] that all `messages` carry.

        Raises:
            ProtocolError: they carry different ones, none that fits, or wishes that nobody heeds.
        """
        contents = {id(message.content): message.content for message in messages}  # Flower's own share one
        first, *others = [_theta_in(content, self.workbench) for content in contents.values()]
        if not all(first.equal(other) for other in others):
            raise ProtocolError("the messages of one round carry different arrays; all clients start from the same")
        return first


def _theta_in(content: RecordDict, workbench: Workbench) -> Tensor:
    told = {key for record in content.config_records.values() for key in record} - {"server-round"}
    if told:
        raise ProtocolError(
            f"a message's config has {', '.join(sorted(told))}, which no client heeds: what it does, and with how much "
            "noise, is in the run's configuration"
        )
    if len(content.array_records) != 1:
        raise ProtocolError(f"a message has {len(content.array_records)} ArrayRecords, wanted one: the global slots")
    (arrays,) = content.array_records.values()
    return from_arrays(arrays, workbench.layout)


def _refused(messages: Iterable[Message], why: str) -> list[Message]:
    return [Message(Error(code=_UNKNOWN_ERROR, reason=why), reply_to=message) for message in messages]


def _check_left_to_strategy(config: RunConfig) -> None:
    """Refuse what the strategy would have to do, and does not know of.

    Raises:
        ConfigError: naming the key.
    """
    adapter, federation = config.adapter, config.federation
    if adapter.method not in _AVERAGED:
        raise ConfigError(
            f"adapter.method = {adapter.method} has a server that does more than to average, which no strategy of "
            f"Flower's does; use {', '.join(_AVERAGED)}, or server.strategy.FedloraStrategy"
        )
    wanted: Mapping[str, tuple[object, object]] = {
        "adapter.select": (adapter.select, "none"),
        "federation.weights": (federation.weights, "uniform"),
        "federation.aggregator": (federation.aggregator, "mean"),
        "federation.server_optimizer": (federation.server_optimizer, "none"),
        "federation.wire_dtype": (federation.wire_dtype, "float32"),
        "federation.private_evaluation": (federation.private_evaluation, False),
        "privacy.unit": (config.privacy.unit, "record"),
    }
    for key, (value, default) in wanted.items():
        if value != default:
            raise ConfigError(
                f"{key} = {value} is for fedlora's own server, and here a strategy of Flower's is in its place; "
                f"leave {key} at {default}, or use server.strategy.FedloraStrategy"
            )


def _identify() -> None:
    """Flower's messages name the task that made them, and outside a run nobody has said which that is."""
    try:
        _ = TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id
    except RuntimeError:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def _transport(workbench: Workbench, dataset: EncodedDataset, sites: Sequence[Site], ledger: Ledger) -> CohortTransport:
    prefixes = prefix_cache(workbench, dataset, sites)
    return CohortTransport(workbench=workbench, dataset=dataset, sites=sites, ledger=ledger, prefixes=prefixes)


class _FinetuningBegins(Exception):
    def __init__(self, instruction: RoundInstruction) -> None:
        self.instruction = instruction


@dataclass(frozen=True)
class _BeforeFinetuning:
    """Carries what comes before the fine-tuning, and stops the round loop there."""

    transport: Transport

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        if instruction.phase == FINETUNE:
            raise _FinetuningBegins(instruction)
        return self.transport.exchange(instruction, clients)


def _up_to_finetuning(workbench: Workbench, transport: Transport) -> RoundInstruction:
    """Have fedlora's own server do the rounds before; returns its first instruction to fine-tune, not yet sent."""
    server = Server(
        workbench=workbench,
        transport=_BeforeFinetuning(transport),
        evaluate=lambda theta: {},
        on_round=lambda report, state: None,
    )
    try:
        server.run(initial_state(workbench, f"{workbench.config.digest()[:16]}-{uuid.uuid4().hex[:16]}"))
    except _FinetuningBegins as reached:
        return reached.instruction
    raise AssertionError("a schedule without fine-tuning")
