"""An event loop whose time jumps to the next timer, but stands still while real work is being done.

Whoever calls a real Redis holds the time meanwhile. What waits for a timer alone (engines, training, leases) takes no
real time, and what is calculated or asked of Redis takes no virtual time; it is measured, and reported beside it.
"""

import asyncio
import selectors
import threading
import time
from collections import Counter, deque
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
REAL_WORK_S = 120
"""Longest time, in real seconds, in which a real call must be answered or a thread must come back."""
TRAINER = "the trainer's thread"
REDIS = "Redis"


class _Selector(selectors.DefaultSelector):
    """Asked to wait for a timer, it looks whether anything else has come, and lets the time jump if not."""

    loop: "VirtualTimeLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if timeout is not None and not self.loop.holders:
            self.loop.now += timeout
            return []
        # A second at a time: a process that was stopped for minutes has looked once, not waited for minutes.
        for _ in range(REAL_WORK_S):
            if events := super().select(1.0):
                return events
        waited_for = ", ".join(sorted(self.loop.holders)) or "nobody: no timer is left"
        raise TimeoutError(f"nothing has come within {REAL_WORK_S} s of real time; waited for {waited_for}")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`now` is its time in virtual seconds, from 0; `holders` says who does real work, and how often at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.holders: Counter[str] = Counter()
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    @contextmanager
    def held(self, who: str) -> Iterator[None]:
        """Within the block, `who` does real work: no timer fires."""
        self.holders += Counter([who])
        try:
            yield
        finally:
            self.holders -= Counter([who])

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """For the trainer's thread, which holds the time: let it go on until `work` is done in the loop."""
        assert threading.current_thread() is not threading.main_thread(), "the loop would wait for itself"

        async def released() -> T:
            self.holders -= Counter([TRAINER])
            try:
                return await work
            finally:
                self.holders += Counter([TRAINER])

        return asyncio.run_coroutine_threadsafe(released(), self).result()


class Waiters:
    """Those who wait for something to come, woken in the order in which they came, as Redis wakes blocked clients."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.calls = 0
        """How often `wake` was called."""

    async def wait(self, timeout_s: float, since: int) -> None:
        """Until woken, `timeout_s` at most; not at all if `calls` is not `since` any more.

        Whoever looks for himself first reads it before, or what comes between the two would wake nobody.
        """
        if self.calls != since:
            return
        woken = asyncio.get_running_loop().create_future()
        self._waiting.append(woken)
        await asyncio.wait([woken], timeout=timeout_s)
        if not woken.done():
            woken.cancel()

    def wake(self, count: int) -> None:
        self.calls += 1
        while count and self._waiting:
            woken = self._waiting.popleft()
            if not woken.done():
                woken.set_result(None)
                count -= 1


class OwnTime(Generator[Any, Any, None]):
    """To be awaited in place of some work: `seconds` is the processor's time of its own steps, real ones.

    What it waits for meanwhile does not count.
    """

    def __init__(self, work: Coroutine[Any, Any, None]) -> None:
        self.seconds = 0.0
        self._work = work

    def __await__(self) -> Generator[Any, Any, None]:
        return self

    def send(self, value: Any) -> Any:
        with self._counted():
            return self._work.send(value)

    def throw(self, *error: Any) -> Any:
        with self._counted():
            return self._work.throw(*error)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        began = time.thread_time()
        try:
            yield
        finally:
            self.seconds += time.thread_time() - began
