"""Connections that can be cut: a small proxy between each service of a run and what it talks to.

One event loop in a thread serves all links of a run. A link forwards bytes; it can be held (nothing arrives, nothing is
closed, as when packets are lost), slow, reset, or swallow a reply and then be reset.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any


class Link:
    """One service's way to one other. Everything here happens in the network's loop."""

    def __init__(self, target: Callable[[], str]) -> None:
        """`target` says where to connect, as host:port; asked for every connection. Raises LookupError or OSError."""
        self._target = target
        self._passes = asyncio.Event()
        self._passes.set()
        self._sinks: set[asyncio.StreamWriter] = set()
        self.delay_s = 0.0
        self.swallows_a_reply = False

    async def open(self) -> int:
        """Listen; says on which port."""
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def hold(self) -> None:
        self._passes.clear()

    def let_pass(self) -> None:
        self.delay_s = 0.0
        self._passes.set()

    def reset(self) -> None:
        for sink in self._sinks:
            sink.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            host, _, port = self._target().rpartition(":")
            there, back = await asyncio.open_connection(host, int(port))
        except (OSError, LookupError, ValueError):
            writer.transport.abort()
            return
        ends = {writer, back}
        self._sinks |= ends
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(reader, back, ends, is_reply=False))
                tasks.create_task(self._pump(there, writer, ends, is_reply=True))
        finally:
            self._sinks -= ends

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        ends: set[asyncio.StreamWriter],
        *,
        is_reply: bool,
    ) -> None:
        try:
            while data := await source.read(2**16):
                await asyncio.sleep(self.delay_s)
                await self._passes.wait()
                if is_reply and self.swallows_a_reply:
                    self.swallows_a_reply = False
                    break
                sink.write(data)
                await sink.drain()
        except OSError:
            pass  # an end is gone, and with it the connection
        for end in ends:
            end.transport.abort()


class Network:
    """The links of one run by name, for example "rollout-0 redis". `close` ends them."""

    def __init__(self, targets: dict[str, Callable[[], str]]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()
        self.links = {name: Link(target) for name, target in targets.items()}
        self.ports = {name: self._wait(link.open()) for name, link in self.links.items()}

    def do(self, action: Callable[[], object]) -> None:
        """Call a method of a link."""
        self._loop.call_soon_threadsafe(action)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _wait(self, work: Coroutine[Any, Any, int]) -> int:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)
