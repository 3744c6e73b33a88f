"""Real vLLM whose process stops in the middle of its work: the rollout server notices, says why, and gets rid of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import psutil
import pytest
import torch

from retort.rollouts import SamplingParameters
from services.rollout import vllm_engine
from tests.integration.served_engine import PROMPT, ROOT, Served

pytestmark = pytest.mark.timeout(200)

LONG = SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=200)
CHECK_S = 0.05
FEW, MANY = 10, 40
"""Checks after which an engine hangs, and as many as no engine that hangs is spared."""
SHUT_DOWN_WITHIN_S = 20.0


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    torch.set_num_threads(1)
    served = Served(ROOT / "models" / "tiny")
    served.wait(served.sync())
    yield served
    served.engine.shutdown()
    served.loop.close()


@pytest.fixture(autouse=True)
def checks(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for every check of the engine, which come quickly."""
    made = []
    under_way = served.engine.llm.get_num_unfinished_requests

    def checked() -> int:
        made.append(under_way())
        return made[-1]

    monkeypatch.setattr(vllm_engine, "HEALTH_CHECK_S", CHECK_S)
    monkeypatch.setattr(served.engine.llm, "get_num_unfinished_requests", checked)
    return made


@pytest.fixture
def core(served: Served) -> psutil.Process:
    """The engine's process. Another engine may be there, which other tests use."""
    [process] = served.engine.llm.engine_core.resources.engine_manager.processes
    return psutil.Process(process.pid)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def sampling(served: Served) -> AsyncIterator[None]:
    """Inside, eight completions are under way; afterwards they have ended."""
    samples = asyncio.create_task(served.sample(PROMPT, range(8), LONG))
    await until(lambda: len(served.engine.llm.output_processor.request_states) == 8)
    yield
    await samples


async def is_alive(served: Served, checks: list[int]) -> bool:
    """Whether the engine is still taken for alive after many checks."""
    before = len(checks)
    dead = asyncio.create_task(served.engine.wait_until_dead(silent_checks=FEW))
    await until(lambda: dead.done() or len(checks) >= before + MANY)
    return dead.cancel()


def test_an_engine_that_hangs_while_requests_are_under_way_is_dead_and_the_reason_says_so(
    served: Served, core: psutil.Process
) -> None:
    async def story() -> str:
        async with sampling(served):
            core.suspend()
            try:
                return str(await served.engine.wait_until_dead(silent_checks=FEW))
            finally:
                core.resume()

    assert served.wait(story()) == "the engine has made no token for 0.5 s, with 8 requests under way"


def test_an_engine_that_makes_tokens_is_alive_however_long_its_requests_take(served: Served, checks: list[int]) -> None:
    async def sample_for_ever() -> None:
        while True:
            await served.sample(PROMPT, range(8), LONG)

    async def story() -> None:
        sampling = asyncio.create_task(sample_for_ever())
        assert await is_alive(served, checks)
        assert checks.count(8) > FEW
        sampling.cancel()

    served.wait(story())


def test_an_engine_that_has_nothing_to_do_is_alive(served: Served, core: psutil.Process, checks: list[int]) -> None:
    core.suspend()
    try:
        assert served.wait(is_alive(served, checks))
    finally:
        core.resume()


def test_an_engine_that_is_frozen_for_an_update_is_alive(served: Served, checks: list[int]) -> None:
    async def story() -> None:
        async with sampling(served):
            await served.engine.prepare()
            assert await is_alive(served, checks)
            assert set(checks) == {8}
            await served.engine.abandon()
            await served.sync()

    served.wait(story())


def test_a_pause_of_server_and_engine_together_is_one_check_however_long(
    served: Served, core: psutil.Process, checks: list[int]
) -> None:
    async def story() -> None:
        dead = asyncio.create_task(served.engine.wait_until_dead(silent_checks=MANY))
        async with sampling(served):
            core.suspend()
            before = len(checks)
            time.sleep(1.5 * MANY * CHECK_S)  # what a stopped process sees: its event loop stands still
            assert len(checks) == before
            core.resume()
        assert dead.cancel()

    served.wait(story())


def test_an_engine_that_hangs_is_gone_after_shutdown_and_holds_up_no_request_that_is_cancelled(
    served: Served, core: psutil.Process
) -> None:
    """The last test of this file: it leaves no engine."""

    async def cancel_all() -> None:
        samples = asyncio.create_task(served.sample(PROMPT, range(8), LONG))
        await until(lambda: len(served.engine.llm.output_processor.request_states) == 8)
        core.suspend()
        samples.cancel()
        with pytest.raises(asyncio.CancelledError):
            await samples

    served.wait(cancel_all(), timeout_s=10)
    start = time.monotonic()
    served.engine.shutdown()
    core.wait(SHUT_DOWN_WITHIN_S)
    assert time.monotonic() - start < SHUT_DOWN_WITHIN_S
