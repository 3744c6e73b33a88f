"""Times of a simulated engine, worked out by hand: an engine step is 1 s, and 0.5 s more for each live completion."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from services.rollout.engine_steps import EngineSteps, TokenTime
from simulation.virtual_time import VirtualTimeLoop

TIME = TokenTime(fixed_s=1.0, per_completion_s=0.5)


def in_virtual_time(story: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(story)


async def ends_at(steps: EngineSteps, tokens: int) -> float:
    await steps.run(tokens)
    return asyncio.get_running_loop().time()


def test_a_step_takes_longer_the_more_completions_share_it() -> None:
    async def story() -> list[float]:
        steps = EngineSteps(TIME, limit=8)
        return await asyncio.gather(ends_at(steps, 2), ends_at(steps, 4))

    # Two steps of 2 s with two live, then two of 1.5 s with one.
    assert in_virtual_time(story()) == [4.0, 7.0]


def test_what_has_no_room_waits_for_the_first_that_ends() -> None:
    async def story() -> list[float]:
        steps = EngineSteps(TIME, limit=1)
        return await asyncio.gather(ends_at(steps, 2), ends_at(steps, 4))

    assert in_virtual_time(story()) == [3.0, 9.0]


def test_one_very_long_completion_does_not_hold_the_others() -> None:
    async def story() -> list[float]:
        steps = EngineSteps(TokenTime(1.0, 0.0), limit=2)
        return await asyncio.gather(ends_at(steps, 8192), *(ends_at(steps, 10) for _ in range(3)))

    assert in_virtual_time(story()) == [8192.0, 10.0, 20.0, 30.0]


def test_no_step_is_made_between_pause_and_resume() -> None:
    async def story() -> float:
        steps = EngineSteps(TIME, limit=1)
        running = asyncio.create_task(ends_at(steps, 2))
        await asyncio.sleep(1.0)
        steps.pause()
        await asyncio.sleep(100.0)
        steps.resume()
        return await running

    assert in_virtual_time(story()) == 103.0
