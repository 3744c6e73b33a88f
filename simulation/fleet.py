"""Replicas in virtual time: the rollout service's sampler, presence, receiver and queue around simulated engines."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from redis.asyncio import Redis

from retort.queues import Evicted, RolloutQueue
from retort.queues.protocol import CONSUMER_GROUP, Entry, Keys, Kind
from retort.queues.replies import Reply
from retort.rollouts import Message
from services.rollout.__main__ import run_until_drained
from services.rollout.presence import Presence
from services.rollout.reward_client import RewardClient, Scored
from services.rollout.sampler import Sampler
from services.rollout.simulated_engine import SimulatedEngine
from services.rollout.weight_receiver import WeightReceiver
from simulation.setup import Setup
from simulation.virtual_time import REDIS, VirtualTimeLoop, Waiters

CALLS_AT_ONCE = 64
"""Of all replicas together: each call that is under way has a connection."""
NEVER_S = 10**6
"""Leases run out by Redis' clock, which is real; here a dead replica's are made to, when their virtual time is over."""


class VirtualQueue(RolloutQueue):
    """The queue itself. Its calls hold the time, and its wait for work is a virtual one."""

    def __init__(self, fleet: "Fleet", name: str) -> None:
        super().__init__(fleet.redis, fleet.run, name, NEVER_S, fleet.setup.config.rollout.max_deliveries)
        self._fleet = fleet

    async def _call(self, name: str, *args: str | bytes | int) -> Reply:
        async with self._fleet.calls:
            with self._fleet.loop.held(REDIS):
                reply = await super()._call(name, *args)
        if name == "submit":
            self._fleet.groups.wake(1)
        return reply

    async def _wait_for_new(self, block_s: float) -> list[tuple[Kind, Entry]]:
        since = self._fleet.work.calls
        if found := await self._read_new():
            return found
        await self._fleet.work.wait(block_s, since)
        return await self._read_new()

    async def _read_new(self) -> list[tuple[Kind, Entry]]:
        async with self._fleet.calls:
            with self._fleet.loop.held(REDIS):
                return await super()._wait_for_new(0.0)


class SimulatedReward:
    """Says of every completion after a while that it is right."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def score(self, checker: str, completions: Sequence[str], answer: str) -> list[Scored]:
        await asyncio.sleep(self._seconds)
        return [Scored(1.0, "A", True) for _ in completions]


class Fleet:
    """As many replicas as the run file says, each started again when it is evicted or has died."""

    def __init__(self, setup: Setup, run: str, redis: Redis, loop: VirtualTimeLoop) -> None:
        self.setup, self.run, self.redis, self.loop = setup, run, redis, loop
        self.calls = asyncio.Semaphore(CALLS_AT_ONCE)
        self.work, self.groups = Waiters(), Waiters()
        self._receivers: dict[str, WeightReceiver] = {}
        self._lives: dict[str, asyncio.Task[None]] = {}

    async def keep(self, name: str) -> None:
        """For ever: what a supervisor does."""
        while True:
            queue = VirtualQueue(self, name)
            sampler, presence = self._replica(name, queue)
            await presence.loading()
            life = run_until_drained(sampler, presence, sampler.engine, [], asyncio.Event())
            self._lives[name] = asyncio.create_task(life)
            try:
                [ended], _ = await asyncio.wait([self._lives[name]])
            finally:
                self._lives[name].cancel()
            del self._receivers[name]
            if not ended.cancelled() and (error := ended.exception()):
                if not isinstance(error, BaseExceptionGroup) or error.split(Evicted)[1] is not None:
                    raise error
                await queue.leave()
            else:
                await asyncio.sleep(self.setup.config.rollout.lease_s)
                await self._let_leases_run_out(name)
            await asyncio.sleep(self.setup.restart_s)

    async def kill(self) -> None:
        """Let replicas die, as the setup says. What they have in hand is not given back."""
        for number in range(self.setup.deaths):
            await asyncio.sleep(self.setup.death_every_s)
            self._lives[replica_name(number)].cancel()

    async def answers(self, phase: str, requests: Sequence[tuple[str, Message]]) -> list[Message | None]:
        """What the replicas of these names answer a call of the trainer; None: nobody is there."""

        async def answer(name: str, request: Message) -> Message | None:
            if name not in self._receivers:
                return None
            reply: Message = await getattr(self._receivers[name], phase)(request)
            return reply

        return await asyncio.gather(*(answer(*request) for request in requests))

    def _replica(self, name: str, queue: VirtualQueue) -> tuple[Sampler, Presence]:
        setup, rollout = self.setup, self.setup.config.rollout
        engine = SimulatedEngine(setup.token_time, setup.live_completions, setup.lengths, setup.transfer_s)
        self._receivers[name] = WeightReceiver(engine)
        sampler = Sampler(
            name=name,
            queue=queue,
            engine=engine,
            receiver=self._receivers[name],
            reward=cast(RewardClient, SimulatedReward(setup.reward_s)),
            decode=lambda _: "",
            concurrent_groups=rollout.concurrent_groups,
            lease_s=rollout.lease_s,
            max_deliveries=rollout.max_deliveries,
        )
        return sampler, Presence(name, queue, http_url="", control_url="")

    async def _let_leases_run_out(self, name: str) -> None:
        stream: Any = Keys(self.run).work("train")
        with self.loop.held(REDIS):
            held = await self.redis.xpending_range(stream, CONSUMER_GROUP, "-", "+", 10_000, name)
            ids: list[Any] = [lease["message_id"] for lease in held]
            if ids:
                idle_ms = NEVER_S * 1000
                await self.redis.xclaim(stream, CONSUMER_GROUP, name, 0, ids, idle=idle_ms, justid=True)


def replica_name(number: int) -> str:
    return f"rollout-{number}"
