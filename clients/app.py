"""Flower ClientApp: a courier. It carries bytes between Flower and the site's daemon, and can do nothing else.

Flower sends this code to the site, or rather what a run's submitter calls by this name, and starts a process for every
message. So it has neither records nor secrets, no torch, and no say: the daemon decides (`fedlora.site`). Only in
Flower's simulation engine, where there is no site, is the round done in this process (`clients.simulated`).
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.errors import ConfigError, DaemonUnreachable, ProtocolError
from fedlora.federation.failures import failure_code, log_failure
from fedlora.site.connection import DaemonAddress
from fedlora.site.protocol import Answer, Ask, Request

Handler = Callable[[Message, Context], RecordDict]

app = ClientApp()
log = logging.getLogger("fedlora.client")


def fixed_code_on_failure(handler: Handler) -> Callable[[Message, Context], Message]:
    """`handler` as Flower calls it, with every exception turned into a fixed code: Flower would forward its text."""

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            content = handler(message, context)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic in a Rust extension is no Exception, and may quote its input too
            log_failure(log, error)
            content = _failure("unavailable" if isinstance(error, DaemonUnreachable) else failure_code(error))
        return Message(content, reply_to=message)

    return answer


@app.query()
@fixed_code_on_failure
def enrol(message: Message, context: Context) -> RecordDict:
    """Which client this node is, of how many where it knows, and which code its site runs."""
    answer = _answer("enrol", message, context)
    if answer.code != "ok":
        return _failure(answer.code, _client(context))
    nodes = context.node_config.get("num-partitions", 0)
    digest = str(answer.facts.get("code_digest", ""))
    return RecordDict(
        {"enrolment": ConfigRecord({"client": _client(context), "nodes": int(nodes), "code_digest": digest})}
    )


@app.train()
@fixed_code_on_failure
def train(message: Message, context: Context) -> RecordDict:
    """One round of this node's site; in Flower's simulation engine, of all its clients that the message names."""
    if "asked" not in message.content or not _is_simulated(context):
        return _told(_answer("round", message, context))
    from clients.simulated import answers

    found = answers(_request("round", message, context), _asked(message), context)
    return RecordDict({f"{kind}-{client}": told for client, one in found.items() for kind, told in _told(one).items()})


def _request(ask: Ask, message: Message, context: Context) -> Request:
    instruction = _instruction(message) if ask == "round" else b""
    return Request(ask=ask, client=_client(context), config=dict(context.run_config), instruction=instruction)


def _answer(ask: Ask, message: Message, context: Context) -> Answer:
    request = _request(ask, message, context)
    address = _daemon(context.node_config)
    if address is not None:
        return address.ask(request, limit=message.metadata.ttl)
    if _is_simulated(context):
        from clients.simulated import answer

        return answer(request, context)
    raise ConfigError(
        "this node names no site, so it takes part in nothing; start it with "
        """--node-config 'partition-id=… site="/path/to/site.sock"'"""
    )


def _daemon(node: Mapping[str, object]) -> DaemonAddress | None:
    """Where whoever started this node says that its site's daemon is; no message can change that."""
    keys = {"place": "site", "authority": "site-authority", "certificate": "site-certificate", "key": "site-key"}
    told = {name: str(node[key]) for name, key in keys.items() if key in node}
    return DaemonAddress(**told) if "place" in told else None


def _is_simulated(context: Context) -> bool:
    return _daemon(context.node_config) is None and _in_simulation_engine()


def _in_simulation_engine() -> bool:
    """Whether this process is a worker of Flower's simulation engine: one of Ray's, which a real node never is."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _client(context: Context) -> int:
    """This node's client index.

    Raises:
        ConfigError: the node was started without a usable partition-id.
    """
    client, clients = context.node_config.get("partition-id"), context.run_config.get("federation.clients")
    if not isinstance(client, int) or not isinstance(clients, int) or not 0 <= client < clients:
        raise ConfigError(
            f"this node's partition-id is {client}, wanted a number below federation.clients = {clients}, from 0; "
            'start it with --node-config "partition-id=…", or change federation.clients'
        )
    return client


def _instruction(message: Message) -> bytes:
    try:
        return bytes(message.content["instruction"]["bytes"].data)  # type: ignore[union-attr]
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ProtocolError("a message without an instruction; do server and client run the same fedlora?") from error


def _asked(message: Message) -> list[int]:
    """Which of the clients of a simulation's node are to do the round."""
    return list(message.content["asked"]["clients"])  # type: ignore[arg-type]


def _told(answer: Answer) -> RecordDict:
    if answer.code != "ok":
        return _failure(answer.code)
    return RecordDict({"update": ArrayRecord({"bytes": Array("uint8", (len(answer.update),), "bytes", answer.update)})})


def _failure(code: str, client: int | None = None) -> RecordDict:
    """No answer; of which client, where the server has yet to learn it."""
    whose = {} if client is None else {"client": client}
    return RecordDict({"failure": ConfigRecord({"code": code, **whose})})
