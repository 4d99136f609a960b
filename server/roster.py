"""Which Flower node is which client. Nodes come, go and come back under another id; no wait is without an end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.errors import FedloraError
from fedlora.federation.failures import TRY_AGAIN
from fedlora.provenance import code_digest
from server.post import Post, failure_in

LOOK = 1.0
"""Seconds between two looks at who is there."""
ASK_AGAIN, ASK_REFUSED_AGAIN = 5.0, 60.0
"""Seconds until a node that could not answer, or would not take part, is asked again: it may have been put right."""
_POLL = 0.1

log = logging.getLogger("fedlora.server")


@dataclass(kw_only=True)
class Roster:
    """The nodes of a run. Every new one is asked which client it is, whenever it comes.

    A node is one client. Only whoever starts all nodes itself, in Flower's simulation engine, has fewer of them than
    clients: node w then has the clients w, w + workers, w + 2 workers, … That is for us to say, and for no node.
    """

    grid: Grid
    clients: int
    workers: int
    """Nodes among which the clients are divided."""
    ttl: float
    """Seconds that a node may take to say who it is: its site loads records and model for that."""
    nodes: dict[int, int] = field(default_factory=dict)
    """Node by client."""
    kept_out: dict[int, str] = field(default_factory=dict)
    """What every other node answered: a failure code."""
    refused: dict[int, str] = field(default_factory=dict)
    """The same by client, where it is no passing one."""
    online: frozenset[int] = frozenset()
    begun: bool = False
    """Whether the run has; who comes later can no longer end it."""
    _post: Post[int] = field(init=False)
    _due: dict[int, float] = field(default_factory=dict)
    _looked: float = -LOOK

    def __post_init__(self) -> None:
        self._post = Post(grid=self.grid)

    @property
    def divides(self) -> bool:
        """Whether a node has several clients."""
        return self.workers < self.clients

    def wait(self, deadline: float, minimum: int) -> None:
        """Until all clients are there; at the deadline, `minimum` of them do.

        Args:
            deadline: seconds.
            minimum: of clients.

        Raises:
            FedloraError: there are fewer, two nodes claim to be one client, or one runs other code.
        """
        end = time.monotonic() + deadline
        self.look()
        while len(self.nodes | self.refused) < self.clients and time.monotonic() < end:
            time.sleep(_POLL)
            self.look()
        if len(self.nodes) < self.clients:
            missing = sorted(set(range(self.clients)) - self.nodes.keys())
            refused = sorted(set(self.kept_out.values()))
            told = f"; nodes answered {', '.join(refused)}" if refused else ""
            limit = f" within {deadline:g} s" if time.monotonic() >= end else ""  # else all have said yes or no
            joined = f"{len(self.nodes)} of {self.clients} clients joined{limit}, missing {_listed(missing)}"
            if len(self.nodes) < minimum:
                raise FedloraError(
                    f"{joined}{told}. Start a SuperNode for each, with its own partition-id and its site's daemon, or "
                    f"lower federation.minimum_clients = {minimum}"
                )
            log.warning("%s%s; the run begins without them", joined, told)
        self.begun = True

    def look(self) -> None:
        """See who is online, ask those who are new, and enter who has answered. Does not wait.

        Raises:
            FedloraError: as `wait`, before the run has begun; afterwards such a node is kept out.
        """
        now = time.monotonic()
        if now - self._looked >= LOOK:
            self._looked, self.online = now, frozenset(self.grid.get_node_ids())
            known = set(self.nodes.values())
            for node in sorted(self.online - known):
                if node not in self._post.waits_for and self._due.get(node, now) <= now:
                    self._due[node] = now + ASK_AGAIN
                    self._post.send(RecordDict(), node, MessageType.QUERY, node, ttl=self.ttl)
        for node, reply in self._post.fetch():
            try:
                self._enter(node, reply)
            except FedloraError as error:
                if not self.begun:
                    raise
                log.warning("a node that came late is kept out: %s", error)
                self.kept_out[node], self._due[node] = "protocol", now + ASK_REFUSED_AGAIN

    def online_node(self, client: int) -> int | None:
        """The node of `client`, if it is there."""
        node = self.nodes.get(client)
        return node if node in self.online else None

    def _enter(self, node: int, reply: Message) -> None:
        code, first = self._read(reply)
        clients = () if first is None else range(first, self.clients, self.workers)
        if code != "ok" or first is None:
            self.kept_out[node] = code
            if code not in (*TRY_AGAIN, "no_reply"):
                self._due[node] = time.monotonic() + ASK_REFUSED_AGAIN
                self.refused |= {client: code for client in clients if client not in self.nodes}
            return
        self.kept_out.pop(node, None)
        before = self.nodes.get(first)
        if before in self.online and before != node:
            raise FedloraError(f"two nodes have partition-id {first}; give every SuperNode its own")
        for client in clients:
            self.refused.pop(client, None)
            self.nodes[client] = node
        if before is not None:
            log.warning("client %d is back, as another node", first)

    def _read(self, reply: Message) -> tuple[str, int | None]:
        """The code "ok", or that of what kept the node out, and which client it is, or its first, where it says so."""
        if (code := failure_in(reply)) is not None:
            return code, self._client_in(reply)
        try:
            answer = reply.content["enrolment"]
            client, known, digest = answer["client"], answer["nodes"], answer["code_digest"]
        except (KeyError, TypeError):
            return "protocol", None
        if type(client) is not int or not 0 <= client < self.workers or type(known) is not int:
            return "protocol", None
        if 0 < known < self.workers:
            raise FedloraError(
                f"the federation has {known} nodes, but federation.clients = {self.clients}; for a simulation add "
                f'--federation-config "num-supernodes={self.clients}" to flwr run, or set federation.clients'
            )
        if digest != code_digest():
            raise FedloraError(
                f"client {client} runs another version of fedlora than the server. A SuperLink or SuperNode prefers "
                "packages in the folder it was started in: start it in an empty one, and install one version everywhere"
            )
        return "ok", client

    def _client_in(self, reply: Message) -> int | None:
        try:
            client = reply.content["failure"]["client"]
        except (KeyError, TypeError, ValueError):
            return None
        return client if type(client) is int and 0 <= client < self.workers else None


def _listed(clients: Iterable[int], most: int = 8) -> str:
    shown = [str(client) for client in clients]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
