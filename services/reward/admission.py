"""How much the service takes on at a time."""

import asyncio
import contextlib
from collections.abc import Iterator

from services.reward.metrics import IN_FLIGHT, REFUSED

MAX_ITEMS = 16_384
MAX_CHARACTERS = 256 << 20
RETRY_AFTER_S = 0.5


class FullError(Exception):
    """The service has as much in hand as it takes. The same request succeeds later."""

    retry_after_s = RETRY_AFTER_S


class Admission:
    """Counts what is in flight and refuses what would be too much."""

    def __init__(self, max_items: int = MAX_ITEMS) -> None:
        self._max_items = max_items
        self._items = 0
        self._characters = 0
        self._freed = asyncio.Event()

    async def room(self, items: int, characters: int) -> None:
        """Wait until `admit` takes as much; it does, if nothing else is awaited in between."""
        while self._is_too_much(items, characters):
            self._freed.clear()
            await self._freed.wait()

    @contextlib.contextmanager
    def admit(self, items: int, characters: int) -> Iterator[None]:
        """Raises FullError. What comes into an idle service is never too much."""
        if self._is_too_much(items, characters):
            REFUSED.inc()
            raise FullError(
                f"{self._items} items are in flight and {items} more would be over {self._max_items}, or their texts "
                f"over {MAX_CHARACTERS >> 20} million characters; try again in {RETRY_AFTER_S} s or add a service"
            )
        self._items += items
        self._characters += characters
        IN_FLIGHT.set(self._items)
        try:
            yield
        finally:
            self._items -= items
            self._characters -= characters
            IN_FLIGHT.set(self._items)
            self._freed.set()

    def _is_too_much(self, items: int, characters: int) -> bool:
        over = self._items + items > self._max_items or self._characters + characters > MAX_CHARACTERS
        return self._items > 0 and over
