"""The round loop's transport over Flower's Grid: asks again what may be asked again, and waits for nobody in vain.

Asking again is safe: a site gives the same answer to the same instruction, and spends once.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedlora.errors import ProtocolError
from fedlora.federation import wire
from fedlora.federation.failures import TRY_AGAIN
from fedlora.federation.messages import ClientFailure, ClientUpdate, RoundInstruction
from fedlora.federation.server import Reply
from server.answers import RoundAnswers
from server.post import Post, code_in, failure_in
from server.roster import ASK_AGAIN, Roster

ASK_SILENT_AGAIN = 60.0
"""Seconds until a client that keeps silent is asked again, at first; then twice as many, and so on."""
SHORTEST_POLL, LONGEST_POLL, POLL_SHARE = 0.05, 1.0, 1 / 40
"""Seconds between two looks for replies, and between them the share of the time waited so far: a round may be short."""

log = logging.getLogger("fedlora.server")


@dataclass(kw_only=True)
class GridTransport:
    """Carries rounds to the nodes of the roster; who does not answer in time is left to the round loop as missing."""

    roster: Roster
    answers: RoundAnswers
    round_deadline: float
    """Seconds for a round."""
    rejoin_deadline: float
    """Seconds that a round waits for a client that has gone, its node or its site's daemon."""
    patience: float = ASK_SILENT_AGAIN
    _gone_since: dict[int, float] = field(default_factory=dict)

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        found = self.answers.begin(instruction)
        replies: dict[int, Reply] = {client: update for client, update in found.items() if client in clients}
        exchange = _Exchange(
            instruction=instruction,
            post=Post(grid=self.roster.grid),
            waiting=set(clients) - replies.keys(),
            end=time.monotonic() + self.round_deadline,
            patience=self.patience,
        )
        begun = time.monotonic()
        while exchange.waiting and time.monotonic() < exchange.end:
            self.roster.look()
            self._ask(exchange, replies)
            for (node, asked), reply in exchange.post.fetch():
                for client, answer in _read(reply, node, asked, self.roster.divides).items():
                    self._take(exchange, client, node, answer, replies)
            if all(self._is_gone(exchange, client) for client in exchange.waiting):
                break
            time.sleep(min(max(SHORTEST_POLL, POLL_SHARE * (time.monotonic() - begun)), LONGEST_POLL))
        return [*replies.values()]

    def _ask(self, exchange: _Exchange, replies: dict[int, Reply]) -> None:
        now = time.monotonic()
        due: dict[int, list[int]] = {}
        for client in sorted(exchange.waiting):
            node = self.roster.online_node(client)
            if client in self.roster.refused:
                self._close(exchange, client, self.roster.refused[client], replies)
            elif node is None:
                self._gone_since.setdefault(client, now)
            elif exchange.due.get((client, node), now) <= now:
                due.setdefault(node, []).append(client)
        for node, asked in due.items():
            exchange.ask(node, tuple(asked), now, self.roster.divides)

    def _take(self, exchange: _Exchange, client: int, node: int, reply: _Read, replies: dict[int, Reply]) -> None:
        now = time.monotonic()
        if client not in exchange.waiting:
            return  # it was asked twice, and has answered twice
        if isinstance(reply, str) and reply in (*TRY_AGAIN, "no_reply"):
            exchange.due[client, node] = now + ASK_AGAIN
            if reply != "busy":
                self._gone_since.setdefault(client, now)
        else:
            self._gone_since.pop(client, None)
            self._close(exchange, client, reply, replies)

    def _close(self, exchange: _Exchange, client: int, reply: _Read, replies: dict[int, Reply]) -> None:
        exchange.waiting.discard(client)
        if isinstance(reply, str):
            replies[client] = ClientFailure(client, reply)
            log.warning("round %d: client %d failed: %s", exchange.instruction.round_index, client, reply)
        else:
            replies[client], data = reply
            self.answers.keep(reply[0], data)

    def _is_gone(self, exchange: _Exchange, client: int) -> bool:
        """Whether nothing is to be expected of `client` in this round any more."""
        since, node = self._gone_since.get(client), self.roster.online_node(client)
        computing = any(node == other and client in asked for other, asked in exchange.post.waits_for)
        return since is not None and not computing and time.monotonic() - since > self.rejoin_deadline


_Read = str | tuple[ClientUpdate, bytes]
"""A failure code, or an update and its bytes."""


@dataclass(kw_only=True)
class _Exchange:
    """One round under way."""

    instruction: RoundInstruction
    post: Post[tuple[int, tuple[int, ...]]]
    """Its messages, by node and the clients that it is asked about."""
    waiting: set[int]
    """Clients that have given no final answer."""
    end: float
    patience: float
    """Seconds until a client that keeps silent is asked again, at first."""
    due: dict[tuple[int, int], float] = field(default_factory=dict)
    """When to ask a client at a node again."""
    _patience: dict[int, float] = field(default_factory=dict)
    _encoded: bytes = field(init=False)

    def __post_init__(self) -> None:
        self._encoded = wire.encode_instruction(self.instruction)

    def ask(self, node: int, clients: tuple[int, ...], now: float, divides: bool) -> None:
        """Post the instruction. Flower may lose it with a process, unnoticed, so it is posted again after a while."""
        for client in clients:
            patience = self._patience.get(client, self.patience)
            self._patience[client], self.due[client, node] = 2 * patience, now + patience
        content = _packed(self._encoded)
        if divides:
            content["asked"] = ConfigRecord({"clients": list(clients)})
        self.post.send(
            content,
            node,
            MessageType.TRAIN,
            (node, clients),
            ttl=self.end - now,
            group=str(self.instruction.round_index),
        )


def _read(reply: Message, node: int, clients: tuple[int, ...], divides: bool) -> dict[int, _Read]:
    """What `node` answered for each of `clients`. It speaks for nobody else, and an error's text is not looked at."""
    if (code := failure_in(reply)) is not None:
        return dict.fromkeys(clients, code)
    if reply.metadata.src_node_id != node:
        return dict.fromkeys(clients, "protocol")
    if not divides:
        return {client: _read_one(reply.content, client) for client in clients}
    return {client: _read_one(_part(reply.content, client), client) for client in clients}


def _part(content: RecordDict, client: int) -> RecordDict:
    """What would be all of the reply if its node were `client` alone."""
    kinds = {"update": f"update-{client}", "failure": f"failure-{client}"}
    return RecordDict({kind: content[name] for kind, name in kinds.items() if name in content})


def _read_one(content: RecordDict, client: int) -> _Read:
    if (code := code_in(content)) is not None:
        return code
    try:
        data = bytes(content["update"]["bytes"].data)  # type: ignore[union-attr]
        update = wire.decode_update(data)
    except (ProtocolError, KeyError, AttributeError, TypeError, ValueError):
        return "protocol"
    return (update, data) if update.client == client else "protocol"


def _packed(data: bytes) -> RecordDict:
    """Bytes as Flower sends them in chunks, in a record of their own: Flower and its mods write into records."""
    return RecordDict({"instruction": ArrayRecord({"bytes": Array("uint8", (len(data),), "bytes", data)})})
