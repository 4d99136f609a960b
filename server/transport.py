"""The round loop's transport over Flower's Grid. No wait is without an end and no two messages share a record."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.errors import FedloraError, ProtocolError
from fedlora.federation import wire
from fedlora.federation.failures import FAILURE_CODES
from fedlora.federation.messages import ClientFailure, RoundInstruction
from fedlora.federation.server import Reply
from fedlora.provenance import code_digest

NODES_DEADLINE = 300.0
"""Seconds until every client of the run must have joined, the engine's own start included."""
ROUND_TIMEOUT = 3600.0
"""Seconds until a round goes on without those who have not answered."""
POLL = 1.0


@dataclass(frozen=True, kw_only=True)
class GridTransport:
    """Carries rounds to the enrolled nodes; whoever does not answer in time is left to the round loop as missing."""

    grid: Grid
    nodes: Mapping[int, int]
    """Node id by client index."""
    timeout: float = ROUND_TIMEOUT

    def exchange(self, instruction: RoundInstruction, clients: tuple[int, ...]) -> list[Reply]:
        data = wire.encode_instruction(instruction)
        asked = {self.nodes[client]: client for client in clients}
        messages = [
            Message(_pack(data), node, MessageType.TRAIN, ttl=self.timeout, group_id=str(instruction.round_index))
            for node in asked
        ]
        replies = self.grid.send_and_receive(messages, timeout=self.timeout)
        return [
            _read(reply, asked[reply.metadata.src_node_id]) for reply in replies if reply.metadata.src_node_id in asked
        ]


def enrol(grid: Grid, clients: int, deadline: float = NODES_DEADLINE) -> dict[int, int]:
    """Ask every node which client it is, until all `clients` have joined.

    Returns:
        Node id by client index.

    Raises:
        FedloraError: clients are missing at the deadline, there are too few nodes, two of them claim to be one client,
            or one runs other code.
    """
    end = time.monotonic() + deadline
    nodes: dict[int, int] = {}
    answers: dict[int, str] = {}
    while len(nodes) < clients and (left := end - time.monotonic()) > 0:
        new = [node for node in grid.get_node_ids() if node not in answers]
        asked = [Message(RecordDict(), node, MessageType.QUERY, ttl=left) for node in new]
        for reply in grid.send_and_receive(asked, timeout=left) if asked else ():
            answers[reply.metadata.src_node_id] = _enrol_one(reply, nodes, clients)
        if len(nodes) < clients:
            time.sleep(min(POLL, max(0.0, end - time.monotonic())))
    if len(nodes) < clients:
        missing = sorted(set(range(clients)) - nodes.keys())
        refused = sorted(set(answers.values()) - {""})
        raise FedloraError(
            f"{len(nodes)} of {clients} clients joined within {deadline:g} s, missing {_listed(missing)}"
            f"{'; nodes answered ' + ', '.join(refused) if refused else ''}. "
            "Start as many SuperNodes as federation.clients, each with its own partition-id"
        )
    return nodes


def _enrol_one(reply: Message, nodes: dict[int, int], clients: int) -> str:
    """Enter the node that answered; what kept it out, or nothing."""
    if reply.has_error():
        return "no_reply"
    if (code := _failure(reply)) is not None:
        return code
    try:
        answer = reply.content["enrolment"]
        client, known, digest = answer["client"], answer["nodes"], answer["code_digest"]
    except (KeyError, TypeError):
        return "protocol"
    if type(client) is not int or not 0 <= client < clients or type(known) is not int:
        return "protocol"
    if 0 < known < clients:
        raise FedloraError(
            f"the federation has {known} nodes, but federation.clients = {clients}; for a simulation add "
            f'--federation-config "num-supernodes={clients}" to flwr run, or set federation.clients'
        )
    if digest != code_digest():
        raise FedloraError(
            f"client {client} runs another version of fedlora than the server. A SuperLink or SuperNode prefers "
            "packages in the folder it was started in: start it in an empty one, and install one version everywhere"
        )
    if nodes.setdefault(client, reply.metadata.src_node_id) != reply.metadata.src_node_id:
        raise FedloraError(f"two nodes have partition-id {client}; give every SuperNode its own")
    return ""


def _read(reply: Message, client: int) -> Reply:
    """What the node of `client` answered. It speaks for nobody else, and an error's text is not looked at."""
    if reply.has_error():
        return ClientFailure(client, "no_reply")
    if (code := _failure(reply)) is not None:
        return ClientFailure(client, code)
    try:
        update = wire.decode_update(bytes(reply.content["update"]["bytes"].data))  # type: ignore[union-attr]
    except (ProtocolError, KeyError, AttributeError, TypeError, ValueError):
        return ClientFailure(client, "protocol")
    return update if update.client == client else ClientFailure(client, "protocol")


def _failure(reply: Message) -> str | None:
    """The failure code in a reply, if it is one; a code of the client's own making counts as a breach of protocol."""
    if "failure" not in reply.content:
        return None
    try:
        code = reply.content["failure"]["code"]
    except (KeyError, TypeError):
        return "protocol"
    return code if isinstance(code, str) and code in FAILURE_CODES else "protocol"


def _pack(data: bytes) -> RecordDict:
    """Bytes as Flower sends them in chunks, in a record of their own: Flower and its mods write into records."""
    return RecordDict({"instruction": ArrayRecord({"bytes": Array("uint8", (len(data),), "bytes", data)})})


def _listed(clients: Iterable[int], most: int = 8) -> str:
    shown = [str(client) for client in clients]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
