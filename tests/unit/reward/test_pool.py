"""Who may run at a time; what runs is in tests/integration/test_reward_hostile.py."""

import asyncio
import contextlib

from services.reward.isolation.pool import QUICK_PER_CORE, Lanes


def test_items_known_to_be_slow_make_room_for_others() -> None:
    async def run() -> tuple[bool, bool]:
        lanes = Lanes(cores=1)
        async with contextlib.AsyncExitStack() as running:
            places = [await running.enter_async_context(lanes.enter("math")) for _ in range(QUICK_PER_CORE)]
            next_one = asyncio.create_task(running.enter_async_context(lanes.enter("math")))
            done, _ = await asyncio.wait([next_one], timeout=0.05)
            waited = not done
            assert await lanes.move(places[0])
            await asyncio.wait([next_one], timeout=5)
            return waited, next_one.done()

    assert asyncio.run(run()) == (True, True)
