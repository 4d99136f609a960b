"""Flower's Grid in this process, for the real apps and messages."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

import clients.app
import clients.simulated
from fedlora.config import RunConfig
from fedlora.experiments.run_folder import RunFolder
from server.app import prepare, serve

RUN_ID = 7


class LocalGrid(Grid):
    """Copies what Ray copies. Node ids are not in the order of clients; each node has its own context."""

    def __init__(self, config: RunConfig, workers: int | None = None) -> None:
        self.workers = workers
        nodes = workers or config.federation.clients
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1
        self.contexts = {1000 - node: context_of(node, config, nodes) for node in range(nodes)}
        self.forgetful = False
        """Whether every message meets a new process, which knows only what is in the context."""
        self.silent: set[int] = set()
        self.tamper: Callable[[int, Message], Message] = lambda client, answer: answer
        """What the node of a client makes of its answer."""
        self.sent: list[Message] = []
        self.replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        assert not any(message.content is sent.content for sent in self.sent), "every message needs its own record"
        self.sent.append(message)
        message.metadata.__dict__["_message_id"] = str(len(self.sent))
        node = message.metadata.dst_node_id
        if node in self.contexts and 1000 - node not in self.silent:
            self.replies[message.metadata.message_id] = self.deliver(message)
        return [message.metadata.message_id]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(identifier) for identifier in message_ids if identifier in self.replies]

    def deliver(self, message: Message) -> Message:
        if self.forgetful:
            forget()
        node = message.metadata.dst_node_id
        context = pickle.loads(pickle.dumps(self.contexts[node]))
        answer = clients.app.app(pickle.loads(pickle.dumps(message)), context)
        self.contexts[node] = context
        return self.tamper(1000 - node, answer)

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *_: Any, **__: Any) -> Iterable[Message]:
        raise NotImplementedError


def context_of(node: int, config: RunConfig, nodes: int) -> Context:
    return Context(
        run_id=RUN_ID,
        node_id=1000 - node,
        node_config={"partition-id": node, "num-partitions": nodes},
        state=RecordDict(),
        run_config=dict(config.to_flower()),
    )


def forget() -> None:
    """What a new process has not."""
    clients.simulated._site.cache_clear()
    clients.simulated._ledger.cache_clear()


class Silent:
    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...

    def round(self, report: Any) -> None: ...

    def finish(self, record: Any) -> None: ...


def run(config: RunConfig, grid: LocalGrid) -> Path:
    workbench = prepare(config)
    folder = RunFolder.of(config)
    serve(grid, workbench, folder, Silent(), grid.workers)
    return folder.path


def rounds(folder: Path) -> list[dict[str, Any]]:
    return RunFolder(folder).read_rounds()


def trained(grid: LocalGrid) -> list[Message]:
    return [message for message in grid.sent if message.metadata.message_type == "train"]
