"""A second checker scores the same traffic, and where the two disagree, that is reported."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from retort.telemetry import log_event
from services.reward.checkers import Reward, Verdict
from services.reward.metrics import SHADOWED
from services.reward.scoring import Item, Scored

WAITING_ITEMS = 4096

Score = Callable[[Item, str], Awaitable[Scored]]
"""Scores an item with the named checker instead of its own."""


class Shadow:
    """Scores after the answer has been sent, as far as there is time: what does not fit in the queue is skipped."""

    def __init__(self, pairs: Mapping[str, str]) -> None:
        """`pairs` maps the name of a checker to the name of its shadow."""
        self._pairs = pairs
        self._waiting: asyncio.Queue[tuple[Item, Verdict]] = asyncio.Queue(WAITING_ITEMS)

    def follows(self, checker: str) -> bool:
        return checker in self._pairs

    def offer(self, item: Item, verdict: Verdict) -> None:
        """Remember an item that was scored."""
        try:
            self._waiting.put_nowait((item, verdict))
        except asyncio.QueueFull:
            SHADOWED.labels(item.checker, self._pairs[item.checker], "skipped").inc()

    async def run(self, score: Score) -> None:
        """Score what was offered, for ever."""
        while True:
            item, verdict = await self._waiting.get()
            try:
                await self._compare(item, verdict, score)
            except Exception as error:  # noqa: BLE001  # whatever it is, the next item may do
                SHADOWED.labels(item.checker, self._pairs[item.checker], "failed").inc()
                log_event("shadow_failed", id=item.id, checker=item.checker, error=f"{type(error).__name__}: {error}")

    async def _compare(self, item: Item, verdict: Verdict, score: Score) -> None:
        name = self._pairs[item.checker]
        second = await score(item, name)
        agree = _reward(verdict) == _reward(second.verdict)
        SHADOWED.labels(item.checker, name, "agree" if agree else "disagree").inc()
        if not agree:
            log_event(
                "shadow_disagrees",
                id=item.id,
                checker=item.checker,
                reward=_reward(verdict),
                shadow=second.checker,
                shadow_reward=_reward(second.verdict),
                answer=item.answer[:80],
                end_of_completion=item.completion[-80:],
            )


def _reward(verdict: Verdict) -> float | None:
    return verdict.value if isinstance(verdict, Reward) else None
