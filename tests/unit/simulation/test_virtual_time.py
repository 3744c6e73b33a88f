"""The event loop of the simulation: time that jumps, and stands still during real work."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from simulation import virtual_time
from simulation.virtual_time import REDIS, TRAINER, OwnTime, VirtualTimeLoop


def run(work: Coroutine[Any, Any, float]) -> float:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work)


def the_loop() -> VirtualTimeLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop


def test_an_hour_is_over_at_once() -> None:
    async def an_hour() -> float:
        await asyncio.sleep(3600.0)
        return the_loop().now

    began = time.monotonic()
    assert run(an_hour()) == 3600.0
    assert time.monotonic() - began < 60.0


def test_time_stands_still_while_somebody_does_real_work() -> None:
    async def work_beside_a_timer() -> float:
        timer = asyncio.create_task(asyncio.sleep(1.0))
        with the_loop().held(REDIS):
            await asyncio.to_thread(time.sleep, 0.05)
        assert not timer.done()
        return the_loop().now

    assert run(work_beside_a_timer()) == 0.0


def test_the_trainer_lets_time_go_on_while_it_waits() -> None:
    async def story() -> float:
        loop = the_loop()
        with loop.held(TRAINER):
            await asyncio.to_thread(loop.wait, asyncio.sleep(7.0))
            assert loop.holders == {TRAINER: 1}, "it holds the time again"
        return loop.now

    assert run(story()) == 7.0


@pytest.mark.parametrize(("holder", "said"), [(REDIS, "waited for Redis"), (None, "nobody: no timer is left")])
def test_a_wait_without_an_end_says_who_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, holder: str | None, said: str
) -> None:
    async def for_ever() -> float:
        if holder is None:
            return await asyncio.Future[float]()
        with the_loop().held(holder):
            return await asyncio.Future[float]()

    monkeypatch.setattr(virtual_time, "REAL_WORK_S", 1)
    with pytest.raises(TimeoutError, match=said):
        run(for_ever())


def wait_for_a_second() -> None:
    """In a process of its own: real work of ten times a tenth of a second, of which nobody hears before its end."""
    virtual_time.REAL_WORK_S = 2

    def work_in_a_thread() -> None:
        for tenth in range(10):
            time.sleep(0.1)
            if tenth == 2:
                print("waited for", flush=True)

    async def work() -> float:
        with the_loop().held(TRAINER):
            await asyncio.to_thread(work_in_a_thread)
        return 0.0

    run(work())


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    call = f"from {__name__} import wait_for_a_second; wait_for_a_second()"
    with subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"waited for\n"
        os.kill(process.pid, signal.SIGSTOP)
        # Stopped for longer than it would wait.
        time.sleep(2.5)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(timeout=30) == 0


def test_own_time_leaves_out_what_is_waited_for() -> None:
    """Two tenths of a second are spent, one of them by a task that is waited for."""

    def work(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    async def other() -> None:
        work(0.1)

    async def both() -> None:
        await asyncio.create_task(other())
        work(0.1)

    own = OwnTime(both())

    async def run() -> None:
        await own

    asyncio.run(run())
    assert 0.1 <= own.seconds < 0.15


def test_own_time_passes_on_what_its_work_raises_and_what_ends_it() -> None:
    caught = []

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            caught.append("cancelled")
            raise ValueError("said by the work") from None

    async def run() -> None:
        task = asyncio.create_task(awaited(OwnTime(stubborn())))
        await asyncio.sleep(0)
        task.cancel()
        await task

    async def awaited(own: OwnTime) -> None:
        await own

    with pytest.raises(ValueError, match="said by the work"):
        asyncio.run(run())
    assert caught == ["cancelled"]
