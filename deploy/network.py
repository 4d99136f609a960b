"""A wire between two ports of this machine that can be cut and mended."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine
from typing import Any

CHUNK = 65536
ANSWERED_WITHIN = 0.1  # seconds in which this machine takes a connection to itself, if it does at all


class Wire:
    """A TCP relay on a free port of 127.0.0.1; TLS passes through unread.

    While it is cut, packets are lost as far as anyone can tell: what was sent on open connections waits, and new ones
    are neither taken nor refused. What waits is delivered when the wire is mended, unless an end has given up by then.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._mended = asyncio.Event()
        self._mended.set()
        self._fillers: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._accept(), self._loop)

    def cut(self) -> None:
        self._call(self._cut())

    def mend(self) -> None:
        self._call(self._mend())

    def close(self) -> None:
        self._call(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._listener.close()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _cut(self) -> None:
        """Hold everything, and fill the queue of connections, so that the system drops further attempts unanswered."""
        self._mended.clear()
        while True:
            filler = socket.socket()
            filler.setblocking(False)
            self._fillers.append(filler)
            try:
                await asyncio.wait_for(self._loop.sock_connect(filler, ("127.0.0.1", self.port)), ANSWERED_WITHIN)
            except TimeoutError:
                return

    async def _mend(self) -> None:
        while self._fillers:
            self._fillers.pop().close()
        self._mended.set()

    async def _shut(self) -> None:
        await self._mend()
        relays = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in relays:
            task.cancel()
        await asyncio.gather(*relays, return_exceptions=True)

    async def _accept(self) -> None:
        relays = set()
        while True:
            await self._mended.wait()
            line, _ = await self._loop.sock_accept(self._listener)
            relay = asyncio.create_task(self._relay(line))
            relays.add(relay)  # the loop itself keeps no task alive
            relay.add_done_callback(relays.discard)

    async def _relay(self, line: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=line)
        with contextlib.closing(writer):
            await self._mended.wait()
            try:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
            except OSError:
                return
            with contextlib.closing(far_writer):
                await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._mended.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
