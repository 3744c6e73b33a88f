"""A rollout server's tasks together, over real sockets, with a scripted engine: how it starts, drains and ends."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
import uvloop

from retort.config import ConfigError
from retort.queues import Evicted, InFlight, RolloutQueue, connect_async, request_drain
from retort.weight_sync import CommitRequest, PrepareRequest, ProbeRequest, WeightManifest
from services.rollout.__main__ import EngineDied, listen, run_until_drained
from services.rollout.app import make_app
from services.rollout.control import make_control_app
from services.rollout.presence import Presence
from services.rollout.reward_client import RewardClient
from services.rollout.sampler import IDLE_BLOCK_S
from services.rollout.weight_receiver import WeightReceiver
from tests.integration.queue_run import Run
from tests.integration.replica import AUTHORIZATION
from tests.integration.sampling_replica import GROUP_SIZE, Replica, a_sampler, ids, reward_service, work
from tests.scripted_engine import ScriptedEngine
from tests.unit.rollout.test_weight_receiver import a_transfer

pytestmark = pytest.mark.timeout(60)


@dataclass
class Server(Replica):
    """A replica with its HTTP face."""

    url: str = ""

    async def get(self, path: str) -> tuple[int, str]:
        async with httpx.AsyncClient() as http:
            answer = await http.get(f"{self.url}{path}")
        return answer.status_code, answer.text

    async def until_healthy(self) -> None:
        async with asyncio.timeout(10):
            while True:
                try:
                    assert await self.get("/healthz") == (200, "ok\n")
                except httpx.ConnectError:
                    await asyncio.sleep(0.01)
                else:
                    return


@asynccontextmanager
async def server(run: Run, reward_address: str) -> AsyncIterator[tuple[Server, "asyncio.Task[None]"]]:
    """A server that has loaded its engine and serves no version yet, and the task in which it runs."""
    redis = await connect_async(run.url)
    queue = RolloutQueue(redis, run.run_id, "rollout-0", 5.0, max_deliveries=2)
    await queue.declare()
    reward = RewardClient(reward_address, deadline_s=2.0)
    engine = ScriptedEngine()
    receiver = WeightReceiver(engine)
    sampler = a_sampler(queue, receiver, reward)
    listening, control = listen("127.0.0.1", 0), listen("127.0.0.1", 0)
    url, control_url = (f"http://127.0.0.1:{one.getsockname()[1]}" for one in (listening, control))
    one = Server(engine, receiver, sampler, run.trainer(), url=url)
    presence = Presence("rollout-0", queue, http_url=url, control_url=control_url)
    faces = [(make_app(receiver), listening), (make_control_app(receiver, AUTHORIZATION), control)]
    running = asyncio.create_task(run_until_drained(sampler, presence, engine, faces, one.draining))
    try:
        yield one, running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await reward.close()
        await redis.aclose()


def test_a_server_that_has_announced_itself_can_be_called_before_it_answers(
    run: Run, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow_to_start(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(uvicorn.Server, "serve", slow_to_start)

    async def story() -> None:
        async with server(run, f"127.0.0.1:{unused_port}") as (one, _):
            await one.until(lambda: run.view.members().keys() == {"rollout-0"})
            url = httpx.URL(one.url)
            _, writer = await asyncio.open_connection(url.host, url.port)
            writer.close()

    uvloop.run(story())


def test_a_server_that_is_told_to_end_in_an_update_says_so_and_ends_when_that_is_over(run: Run) -> None:
    """The trainer leaves out who drains, and a transfer waits for everybody who is in it."""

    async def story(reward_address: str) -> None:
        async with server(run, reward_address) as (one, running):
            await one.until_healthy()
            await one.load(0)
            await one.receiver.prepare(PrepareRequest(epoch=1, version=1, manifest=WeightManifest(buckets=[])))
            await one.until(lambda: [member.state for member in run.view.members().values()] == ["updating"])
            one.draining.set()
            await asyncio.sleep(IDLE_BLOCK_S + 0.5)  # longer than the sampler's wait for a version
            assert [member.state for member in run.view.members().values()] == ["updating"]
            assert not running.done()

            await one.receiver.transfer(a_transfer(epoch=1))
            await one.receiver.probe(ProbeRequest(epoch=1, prompt_ids=[1, 2, 3]))
            await one.receiver.commit(CommitRequest(epoch=1, version=1))
            await asyncio.wait_for(running, 10)

    with reward_service(port=0) as address:
        uvloop.run(story(address))


def test_a_server_that_is_told_to_end_answers_until_its_last_group_is_submitted(run: Run) -> None:
    async def story(reward_address: str) -> None:
        async with server(run, reward_address) as (one, running):
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, one.draining.set)
            await one.until_healthy()
            await one.load(0)
            one.engine.gate.clear()
            await one.issue(work("in-hand"))
            await one.until(lambda: one.samples() == GROUP_SIZE)

            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(one.draining.wait(), 5)
            await asyncio.sleep(IDLE_BLOCK_S + 0.5)  # longer than the sampler's wait for new work
            assert await one.get("/readyz") == (200, "serving policy version 0\n")
            assert not running.done()

            one.engine.gate.set()
            await asyncio.wait_for(running, 10)
            assert ids(await one.finished()) == ["in-hand"]
            with pytest.raises(httpx.ConnectError):
                await one.get("/healthz")

    with reward_service(port=0) as address:
        uvloop.run(story(address))


def test_a_server_that_is_asked_to_drain_says_so_finishes_its_group_and_leaves(run: Run) -> None:
    async def story(reward_address: str) -> None:
        async with server(run, reward_address) as (one, running):
            await one.until_healthy()
            await one.load(0)
            one.engine.gate.clear()
            await one.issue(work("in-hand"))
            await one.until(lambda: one.samples() == GROUP_SIZE)

            request_drain(run.redis, run.run_id, one.trainer.members()["rollout-0"])
            await one.until(lambda: one.trainer.members()["rollout-0"].state == "draining")
            await asyncio.sleep(IDLE_BLOCK_S + 0.5)  # longer than the sampler's wait for new work
            await one.issue(work("too-late"))
            assert not running.done()

            one.engine.gate.set()
            await asyncio.wait_for(running, 10)
            assert ids(await one.finished()) == ["in-hand"]
            assert await one.in_flight() == InFlight(waiting=1, leased=0, finished=1)

    with reward_service(port=0) as address:
        uvloop.run(story(address))


def test_a_server_whose_engine_died_ends_and_says_why(run: Run, unused_port: int) -> None:
    async def story() -> None:
        async with server(run, f"127.0.0.1:{unused_port}") as (one, running):
            await one.until_healthy()
            one.engine.died.set()
            with pytest.raises(ExceptionGroup) as raised:
                await asyncio.wait_for(running, 10)
            assert raised.group_contains(EngineDied, match="the script says that it died")

    uvloop.run(story())


def test_a_server_that_was_evicted_ends(run: Run, unused_port: int) -> None:
    async def story() -> None:
        async with server(run, f"127.0.0.1:{unused_port}") as (one, running):
            await one.until(lambda: "rollout-0" in one.trainer.members())
            one.trainer.evict(one.trainer.members()["rollout-0"])
            with pytest.raises(ExceptionGroup) as raised:
                await asyncio.wait_for(running, 10)
            assert raised.group_contains(Evicted)

    uvloop.run(story())


def test_a_port_in_use_is_told_with_the_keys_of_the_run_file() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"rollout.port = {port}: Address already in use. Choose another, or 0."):
            listen("127.0.0.1", port)
