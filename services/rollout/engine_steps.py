"""How long a simulated engine takes: completions that share it, each step giving one token to all that are live."""

import asyncio
import heapq
import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenTime:
    """Seconds of one engine step: a part that does not depend on the batch, and a part for each live completion."""

    fixed_s: float
    per_completion_s: float

    def step_s(self, live: int) -> float:
        return self.fixed_s + self.per_completion_s * live


class EngineSteps:
    """Counts steps in the time of the event loop, so that nothing has to happen in most of them.

    At most `limit` completions are live; the others wait in the order in which they came.
    """

    def __init__(self, time: TokenTime, limit: int) -> None:
        self._time = time
        self._room = asyncio.Semaphore(limit)
        self._ends: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._done = 0.0
        self._since = 0.0
        self._is_paused = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def done(self) -> float:
        """Steps made so far."""
        self._advance()
        return self._done

    async def run(self, tokens: int) -> float:
        """Be live for so many steps; answers after how many steps of the engine that began."""
        async with self._room:
            began = self.done
            ended = asyncio.get_running_loop().create_future()
            heapq.heappush(self._ends, (began + tokens, next(self._order), ended))
            self._wait_for_next_end()
            await ended
        return began

    def pause(self) -> None:
        """Make no step until `resume`."""
        self._advance()
        self._is_paused = True
        self._wait_for_next_end()

    def resume(self) -> None:
        self._advance()
        self._is_paused = False
        self._wait_for_next_end()

    def _advance(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._ends and not self._is_paused:
            # Not past the next end: the timer that stands for it may come a little late.
            made = (now - self._since) / self._time.step_s(len(self._ends))
            self._done = min(self._done + made, self._ends[0][0])
        self._since = now

    def _wait_for_next_end(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._is_paused or not self._ends:
            return
        steps = self._ends[0][0] - self._done
        self._timer = asyncio.get_running_loop().call_later(steps * self._time.step_s(len(self._ends)), self._end_next)

    def _end_next(self) -> None:
        """The timer's call: whatever the rounding of times, the next end has come."""
        self._advance()
        self._done = self._ends[0][0]
        while self._ends and self._ends[0][0] <= self._done:
            _, _, ended = heapq.heappop(self._ends)
            if not ended.done():
                ended.set_result(None)
        self._wait_for_next_end()
