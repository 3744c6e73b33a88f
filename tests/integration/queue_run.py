"""One run on a real server, with what a test needs to play its trainer and its replicas."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from redis import Redis

from retort.queues import Kind, Lease, Member, RolloutQueue, RunView, TrainerQueue, connect, connect_async
from retort.queues.protocol import CONSUMER_GROUP, Keys
from retort.rollouts import RolloutGroup, SamplingParameters, WorkItem

T = TypeVar("T")


def an_item(group_id: str, kind: Kind = "train", step: int = 1) -> WorkItem:
    return WorkItem(
        group_id=group_id,
        kind=kind,
        step=step,
        min_policy_version=0,
        prompt_ids=[1, 2, 3],
        group_size=0,
        seeds=[],
        sampling=SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=4),
        checker="mcq",
        answer="B",
    )


def a_group(lease: Lease, sampled_by: str = "rollout-0") -> RolloutGroup:
    return RolloutGroup(
        group_id=lease.item.group_id,
        kind=lease.item.kind,
        step=lease.item.step,
        sampled_by=sampled_by,
        prompt_ids=lease.item.prompt_ids,
        rollouts=[],
        generate_seconds=0.5,
        score_seconds=0.25,
    )


def a_member(name: str = "rollout-0", incarnation: str = "first", updated: float = 100.0) -> Member:
    return Member(
        name=name,
        pid=1,
        host="localhost",
        control_url="http://127.0.0.1:1",
        http_url="http://127.0.0.1:2",
        policy_version=None,
        state="loading",
        incarnation=incarnation,
        groups_in_hand=0,
        tokens_generated=0,
        waiting_for="",
        updated=updated,
    )


class Run:
    def __init__(self, url: str, run_id: str) -> None:
        self.url = url
        self.run_id = run_id
        self.keys = Keys(run_id)
        self.redis: Redis = connect(url)
        self.view = RunView(self.redis, run_id)
        self._loop = asyncio.Runner()
        self._clients: list[Any] = []

    def wait(self, call: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(call)

    def trainer(self, epoch: int = 1) -> TrainerQueue:
        trainer = TrainerQueue(self.redis, self.run_id, epoch)
        trainer.open()
        return trainer

    def replica(self, name: str = "rollout-0", lease_s: float = 60.0, max_deliveries: int = 3) -> RolloutQueue:
        client = self.wait(connect_async(self.url))
        self._clients.append(client)
        return RolloutQueue(client, self.run_id, name, lease_s, max_deliveries)

    def take(self, replica: RolloutQueue, limit: int = 10) -> list[Lease]:
        return self.wait(replica.take(limit, block_s=0))

    def let_lease_run_out(self, lease: Lease) -> None:
        """What `lease_s` seconds without renewal do, at once."""
        stream = self.keys.work(lease.item.kind)
        holder = self.redis.xpending_range(stream, CONSUMER_GROUP, lease.entry_id, lease.entry_id, 1)[0]["consumer"]
        self.redis.xclaim(stream, CONSUMER_GROUP, holder, 0, [lease.entry_id], idle=10**9, justid=True)

    def let_member_fall_silent(self, name: str, seconds: float) -> None:
        """As if it had last been heard of so long ago."""
        data = self.redis.hget(self.keys("members"), name)
        assert isinstance(data, bytes)
        stamp, _, member = data.partition(b" ")
        self.redis.hset(self.keys("members"), name, b"%f %b" % (float(stamp) - seconds, member))

    def empty(self) -> None:
        """The server forgets the run."""
        self.redis.delete(*self.keys.of_functions(), self.keys("progress"), self.keys("stop"))

    def close(self) -> None:
        for client in self._clients:
            self.wait(client.aclose())
        self._loop.close()
        self.empty()
        self.redis.close()


def group_ids(leases: list[Lease]) -> list[str]:
    return [lease.item.group_id for lease in leases]
