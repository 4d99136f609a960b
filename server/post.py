"""Messages of one run over Flower's Grid: posted one by one, their replies fetched together. Nothing here waits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlora.federation.failures import FAILURE_CODES

Subject = TypeVar("Subject")


@dataclass(kw_only=True)
class Post(Generic[Subject]):
    """Messages under way, each about a subject."""

    grid: Grid
    _under_way: dict[str, Subject] = field(default_factory=dict)

    def send(self, content: RecordDict, node: int, kind: str, about: Subject, *, ttl: float, group: str = "") -> None:
        """Post a message; Flower takes none for a node that is gone, and then nothing is under way."""
        message = Message(content, node, kind, ttl=ttl, group_id=group)
        self._under_way |= {identifier: about for identifier in self.grid.push_messages([message]) if identifier}

    def fetch(self) -> list[tuple[Subject, Message]]:
        """What has come back since, with what it was about."""
        if not self._under_way:
            return []
        replies = self.grid.pull_messages(list(self._under_way))
        known = [(reply.metadata.reply_to_message_id, reply) for reply in replies]
        return [(self._under_way.pop(about), reply) for about, reply in known if about in self._under_way]

    @property
    def waits_for(self) -> Collection[Subject]:
        """What the messages are about that have had no reply."""
        return self._under_way.values()


def failure_in(reply: Message) -> str | None:
    """The code by which a reply says that it is none."""
    return "no_reply" if reply.has_error() else code_in(reply.content)


def code_in(content: RecordDict) -> str | None:
    """The code of a failure; one of the sender's own making is a breach of protocol."""
    if "failure" not in content:
        return None
    try:
        code = content["failure"]["code"]
    except (KeyError, TypeError):
        return "protocol"
    return code if isinstance(code, str) and code in FAILURE_CODES else "protocol"
