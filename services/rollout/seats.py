"""Seats in the engine for requests from outside, so that training's are never held by them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

OUTSIDE_COMPLETIONS = 16
"""Seats of their own, beside those of training.

vLLM orders by priority only who waits: a completion that runs keeps its seat, however urgent the work behind it. As
many as some people, or an evaluation that is in no hurry, keep busy; more would slow training's own tokens down.
"""


class Seats:
    """So many completions at a time; whoever came first is seated first, all of its completions together."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._free = asyncio.Semaphore(number)
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def taken(self, count: int) -> AsyncIterator[None]:
        """Inside, `count` seats are the caller's; whoever is cancelled, waiting or seated, leaves none taken."""
        if count > self.number:
            raise ValueError(f"{count} seats were asked for, and there are {self.number}")
        taken = 0
        try:
            # One at a time collects seats: two who had half of what they need each would wait for ever.
            async with self._turn:
                while taken < count:
                    await self._free.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self._free.release()
