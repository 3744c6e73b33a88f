"""Who may run at a time; what runs is in tests/integration/test_reward_hostile.py."""

import asyncio
import contextlib

from services.reward.isolation.pool import QUICK_PER_CORE, Lanes, Turns


def test_items_known_to_be_slow_make_room_for_others() -> None:
    async def run() -> tuple[bool, bool]:
        lanes = Lanes(cores=1)
        async with contextlib.AsyncExitStack() as running:
            places = [await running.enter_async_context(lanes.enter("math", Turns())) for _ in range(QUICK_PER_CORE)]
            next_one = asyncio.create_task(running.enter_async_context(lanes.enter("math", Turns())))
            done, _ = await asyncio.wait([next_one], timeout=0.05)
            waited = not done
            assert await lanes.move(places[0])
            await asyncio.wait([next_one], timeout=5)
            return waited, next_one.done()

    assert asyncio.run(run()) == (True, True)


def test_batches_take_turns_however_large_they_are() -> None:
    async def run() -> list[str]:
        lanes = Lanes(cores=1)
        entered: list[str] = []
        large, small = Turns(), Turns()

        async def item(name: str, turns: Turns) -> None:
            async with lanes.enter("math", turns):
                entered.append(name)
                await asyncio.sleep(0)

        async with contextlib.AsyncExitStack() as running:
            for _ in range(QUICK_PER_CORE):
                await running.enter_async_context(lanes.enter("math", Turns()))
            tasks = [asyncio.create_task(item(f"large {n}", large)) for n in range(50)]
            await asyncio.sleep(0)
            tasks += [asyncio.create_task(item(f"small {n}", small)) for n in range(2)]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        return entered

    entered = asyncio.run(run())
    assert len(entered) == 52
    assert entered.index("small 0") <= QUICK_PER_CORE
    assert entered.index("small 1") <= 2 * QUICK_PER_CORE
