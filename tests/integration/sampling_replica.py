"""A replica's main loop with a real queue and a real reward service; only the engine is scripted."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from retort.queues import InFlight, RolloutQueue, TrainerQueue, connect_async
from retort.rollouts import RolloutGroup, SamplingParameters, WorkItem
from retort.weight_sync import CommitRequest, PrepareRequest, ProbeRequest, WeightManifest
from services.rollout.reward_client import RewardClient
from services.rollout.sampler import Sampler
from services.rollout.weight_receiver import WeightReceiver
from tests.integration.queue_run import Run
from tests.scripted_engine import ScriptedEngine, text_of
from tests.unit.rollout.test_weight_receiver import a_transfer

ROOT = Path(__file__).parents[2]
GROUP_SIZE = 4
MAX_DELIVERIES = 2


@contextmanager
def reward_service(port: int) -> Iterator[str]:
    """A reward service that is ready; yields its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "services.reward", "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stderr is not None
            while " ready " not in (line := process.stderr.readline()):
                assert line, "the reward service ended before it was ready"
            yield line.split("address=")[1].split()[0]
        finally:
            process.kill()


def work(group_id: str, *, answer: str = "B", min_policy_version: int = 0, step: int = 9) -> WorkItem:
    """Four completions that answer A, B, C and D."""
    return WorkItem(
        group_id=group_id,
        kind="train",
        step=step,
        min_policy_version=min_policy_version,
        prompt_ids=[1, 2, 3],
        group_size=GROUP_SIZE,
        seeds=[0, 1, 2, 3],
        sampling=SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=40),
        checker="mcq",
        answer=answer,
    )


@dataclass
class Replica:
    """A sampler at work."""

    engine: ScriptedEngine
    receiver: WeightReceiver
    sampler: Sampler
    trainer: TrainerQueue
    draining: asyncio.Event = field(default_factory=asyncio.Event)

    async def issue(self, *items: WorkItem) -> None:
        await asyncio.to_thread(self.trainer.issue, items)

    async def load(self, version: int, *, commit: bool = True) -> None:
        """A weight sync, up to the verified version or to its commit."""
        receiver = self.receiver
        await receiver.prepare(PrepareRequest(epoch=1, version=version, manifest=WeightManifest(buckets=[])))
        await receiver.transfer(a_transfer(epoch=1))
        await receiver.probe(ProbeRequest(epoch=1, prompt_ids=[1, 2, 3]))
        if commit:
            await receiver.commit(CommitRequest(epoch=1, version=version))

    async def groups(self, count: int, timeout_s: float = 20.0) -> list[RolloutGroup]:
        """Wait for so many finished groups; sorted, because the order of arrival is nobody's promise."""
        async with asyncio.timeout(timeout_s):
            while len(groups := await self.finished(block_s=0.1)) < count:
                pass
        return groups

    async def finished(self, block_s: float = 0.0) -> list[RolloutGroup]:
        read = await asyncio.to_thread(self.trainer.read_groups, "train", "0", block_s, 100)
        return sorted((group for _, group in read), key=lambda group: group.group_id)

    async def in_flight(self) -> InFlight:
        return await asyncio.to_thread(self.trainer.in_flight, "train")

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)

    def samples(self) -> int:
        return self.engine.calls.count("sample")


def a_sampler(
    queue: RolloutQueue,
    receiver: WeightReceiver,
    reward: RewardClient,
    *,
    concurrent_groups: int = 8,
    lease_s: float = 5.0,
) -> Sampler:
    """Around the receiver's engine."""
    return Sampler(
        name="rollout-0",
        queue=queue,
        engine=receiver._engine,
        receiver=receiver,
        reward=reward,
        decode=text_of,
        concurrent_groups=concurrent_groups,
        lease_s=lease_s,
        max_deliveries=MAX_DELIVERIES,
    )


@asynccontextmanager
async def replica(
    run: Run,
    reward_address: str,
    *,
    concurrent_groups: int = 8,
    lease_s: float = 5.0,
    budget_s: float = 20.0,
) -> AsyncIterator[Replica]:
    """A replica that serves version 0, drained at the end."""
    redis = await connect_async(run.url)
    queue = RolloutQueue(redis, run.run_id, "rollout-0", lease_s, MAX_DELIVERIES)
    await queue.declare()
    engine = ScriptedEngine()
    receiver = WeightReceiver(engine)
    reward = RewardClient(reward_address, deadline_s=2.0, budget_s=budget_s)
    sampler = a_sampler(queue, receiver, reward, concurrent_groups=concurrent_groups, lease_s=lease_s)
    one = Replica(engine, receiver, sampler, run.trainer())
    await one.load(0)
    try:
        async with asyncio.TaskGroup() as tasks:
            renewing = tasks.create_task(sampler.renew_leases())
            sampling = tasks.create_task(sampler.run(one.draining))
            yield one
            one.engine.gate.set()
            one.draining.set()
            await sampling
            renewing.cancel()
    finally:
        await reward.close()
        await redis.aclose()


def ids(groups: Sequence[RolloutGroup]) -> list[str]:
    return [group.group_id for group in groups]
