"""The trainer in virtual time: its own admission, reader and weight sender, with training that only takes its time."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx
import msgspec
from redis import Redis

from retort.config import WeightSyncConfig
from retort.identity import NOBODY
from retort.questions import Question
from retort.queues import Kind, Member, TrainerQueue
from retort.rollouts import Message, RolloutGroup, WorkItem
from retort.weight_sync import Snapshot, TransferRequest, WeightManifest
from services.trainer.admission import WorkList
from services.trainer.journal import Journal
from services.trainer.publish import may_overlap
from services.trainer.steps import Rank0Steps
from services.trainer.weight_sender import Probe, WeightSender
from simulation.fleet import Fleet
from simulation.virtual_time import OwnTime

Reply = TypeVar("Reply", bound=Message)
EPOCH = 1


class VirtualTrainerQueue(TrainerQueue):
    """The queue itself, whose wait for groups is a virtual one."""

    def __init__(self, redis: Redis, fleet: Fleet) -> None:
        super().__init__(redis, fleet.run, EPOCH)
        self._fleet = fleet

    def issue(self, items: Sequence[WorkItem]) -> Any:
        found = super().issue(items)
        self._fleet.loop.call_soon_threadsafe(self._fleet.work.wake, found.count("new"))
        return found

    def members(self) -> dict[str, Member]:
        """All of them heard of just now: they announce themselves by virtual time, of which real time says nothing.

        Who has died is found when he is called.
        """
        now = time.time()
        return {name: msgspec.structs.replace(member, updated=now) for name, member in super().members().items()}

    def read_groups(self, kind: Kind, cursor: str, block_s: float, limit: int) -> list[tuple[str, RolloutGroup]]:
        since = self._fleet.groups.calls
        if found := super().read_groups(kind, cursor, 0.0, limit):
            return found
        self._fleet.loop.wait(self._fleet.groups.wait(block_s, since))
        return super().read_groups(kind, cursor, 0.0, limit)


class InProcessSender(WeightSender):
    """The sender itself, whose calls reach the replicas of this process. Nothing is broadcast."""

    def __init__(self, queue: TrainerQueue, fleet: Fleet) -> None:
        super().__init__(queue, WeightSyncConfig(), epoch=EPOCH, backend="gloo", authorization="", identity=NOBODY)
        self._fleet = fleet
        self.cpu_s = 0.0
        """What the syncs took of the fleet's loop."""

    async def _ask(
        self,
        http: httpx.AsyncClient,
        phase: str,
        requests: Sequence[tuple[Member, Message]],
        reply_type: type[Reply],
    ) -> list[tuple[Member, Reply]]:
        answers = await self._fleet.answers(phase, [(member.name, request) for member, request in requests])
        succeeded = []
        for (member, _), answer in zip(requests, answers, strict=True):
            if isinstance(answer, reply_type):
                succeeded.append((member, answer))
            else:
                self._evict(member, phase, "nobody answers")
        return succeeded

    async def _send(self, snapshot: Snapshot, transfers: Sequence[tuple[Member, TransferRequest]]) -> None:
        """The replicas' engines take the time of it."""

    def _start(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(self._counted(work), self._fleet.loop)

    async def _counted(self, work: Coroutine[Any, Any, None]) -> None:
        await (own := OwnTime(work))
        self.cpu_s += own.seconds

    def _wait(self, work: Future[None]) -> None:
        async def ended() -> None:
            await asyncio.wait([asyncio.wrap_future(work)])

        self._fleet.loop.wait(ended())


class SimulatedTrainer:
    """Runs the steps in a thread of its own, as it would wait in a process of its own."""

    def __init__(self, redis: Redis, fleet: Fleet, num_steps: int) -> None:
        config = fleet.setup.config
        self._fleet, self._num_steps = fleet, num_steps
        queue = VirtualTrainerQueue(redis, fleet)
        queue.open()
        self._sender = InProcessSender(queue, fleet)
        prompt = [1] * fleet.setup.prompt_tokens
        questions = [
            Question(index=index, messages=[], answer="A", data_source="simulated")
            for index in range(num_steps * config.trainer.groups_per_step)
        ]
        assemble: Callable[[int, list[RolloutGroup]], Any] = lambda _, groups: groups  # noqa: E731
        self._steps = Rank0Steps(
            assemble,
            config,
            work=WorkList(config, questions, [], encode=lambda _: prompt),
            queue=queue,
            sender=self._sender,
            journal=Journal(),
            stop_requested=lambda: False,
        )
        self.step_s: list[float] = []
        self.trained: list[str] = []
        self.tokens = 0
        self.cpu_s = 0.0

    def run(self) -> None:
        config, loop = self._fleet.setup.config, self._fleet.loop
        # The first weights reach the replicas here or, if they join later, in the first step: its time holds both.
        began = loop.now
        self._publish(0)
        for step in range(1, self._num_steps + 1):
            groups: Any
            for groups in self._steps.take(step):
                self.trained += [group.group_id for group in groups]
                self.tokens += sum(len(one.completion_ids) for group in groups for one in group.rollouts)
                share = len(groups) / config.trainer.groups_per_step
                loop.wait(asyncio.sleep(share * self._fleet.setup.training_s))
            self._publish(step)
            self._steps.release(step)
            self.step_s.append(loop.now - began)
            began = loop.now
        self.cpu_s = time.thread_time() + self._sender.cpu_s

    def _publish(self, version: int) -> None:
        self._sender.publish(Snapshot(version, WeightManifest(buckets=[]), [], []), Probe([], []))
        if may_overlap(self._fleet.setup.config.trainer, version) and version < self._num_steps:
            self._sender.start_sync()
        else:
            self._sender.sync()
