"""The main loop of a rollout server: take work, sample it, have it scored, submit it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from retort.queues import Lease, RolloutQueue
from retort.rollouts import Rollout, RolloutGroup, WorkItem
from retort.telemetry import log_event, log_with
from services.rollout import metrics
from services.rollout.engine import Engine, Sampled
from services.rollout.reward_client import (
    RewardClient,
    RewardServiceDownError,
    RewardServiceError,
    Scored,
    UnscorableError,
)
from services.rollout.weight_receiver import WeightReceiver

# Few at a time, so that replicas that are free at the same moment share what is there.
TAKE_AT_ONCE = 4
IDLE_BLOCK_S = 2.0
"""New work wakes the sampler at once; so often it looks for work that others have lost or given back."""


class Decoder(Protocol):
    """Token ids to text, special tokens left out."""

    def __call__(self, ids: Sequence[int]) -> str: ...


@dataclass
class Sampler:
    """Samples groups with up to `concurrent_groups` in hand; renews the leases of all of them."""

    name: str
    queue: RolloutQueue
    engine: Engine
    receiver: WeightReceiver
    reward: RewardClient
    decode: Decoder
    concurrent_groups: int
    lease_s: float
    max_deliveries: int
    in_hand: dict[str, Lease] = field(default_factory=dict)
    scoring_since: dict[str, float] = field(default_factory=dict)
    """Groups of which the scores are awaited, since when (monotonic)."""
    tokens_generated: int = 0
    groups_finished: int = 0
    last_finished: float = 0.0
    _finished: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def run(self, draining: asyncio.Event) -> None:
        """Until `draining` is set and the last group in hand is submitted."""
        async with asyncio.TaskGroup() as tasks:
            while not draining.is_set():
                if not await self.receiver.wait_until_serving(0, IDLE_BLOCK_S) or not await self._has_room():
                    continue
                room = self.concurrent_groups - len(self.in_hand)
                for lease in await self.queue.take(min(room, TAKE_AT_ONCE), IDLE_BLOCK_S):
                    if lease.entry_id in self.in_hand:
                        continue  # this process slept so long that it was given its own work again
                    self.in_hand[lease.entry_id] = lease
                    tasks.create_task(self._work(lease), name=f"group-{lease.item.group_id}")

    async def _has_room(self) -> bool:
        """Wait until fewer than `concurrent_groups` are in hand; False after IDLE_BLOCK_S."""
        async with self._finished:
            try:
                async with asyncio.timeout(IDLE_BLOCK_S):
                    await self._finished.wait_for(lambda: len(self.in_hand) < self.concurrent_groups)
            except TimeoutError:
                return False
        return True

    async def renew_leases(self) -> None:
        """For ever: keep the leases of the groups in hand."""
        while True:
            await asyncio.sleep(self.lease_s / 4)
            if self.in_hand:
                await self.queue.renew(list(self.in_hand.values()))

    async def _work(self, lease: Lease) -> None:
        log_with(group=lease.item.group_id, step=lease.item.step)
        try:
            oldest, newest = lease.item.min_policy_version, lease.item.max_policy_version
            if not await self.receiver.wait_until_serving(oldest, self.lease_s, newest):
                await self.queue.give_back(lease)
                return
            epoch = self.receiver.epoch
            group = await self._group(lease.item)
            if not await self._may_be_submitted(lease.item, group, epoch):
                await self.queue.give_back(lease)
                return
            outcome = await self.queue.submit(lease, group)
            (metrics.GROUPS if outcome == "stored" else metrics.DUPLICATE_GROUPS).inc()
            self.groups_finished, self.last_finished = self.groups_finished + 1, time.time()
        except UnscorableError as error:
            log_event("group_unscorable", logging.WARNING, reason=error)
            # The same seeds would give the same completions and the same verdict: nobody else would fare better.
            await self.queue.bury(lease, str(error))
        except RewardServiceDownError as error:
            log_event("group_given_back", logging.WARNING, reason=error)
            metrics.GIVEN_BACK_GROUPS.inc()
            await self.queue.give_back(lease)
        except RewardServiceError as error:
            log_event("group_refused", logging.WARNING, reason=error)
            if lease.deliveries >= self.max_deliveries:
                await self.queue.bury(lease, str(error))
            else:
                # The lease runs out, which counts as a failure and keeps a refusal from being repeated at once.
                await self.queue.fail(lease, str(error))
        finally:
            async with self._finished:
                del self.in_hand[lease.entry_id]
                self._finished.notify_all()

    async def _may_be_submitted(self, item: WorkItem, group: RolloutGroup, epoch: int) -> bool:
        """Whether every token comes from a policy that was committed and that the item allows; else sample again.

        Tokens of a version that is still being verified wait here.
        """
        versions = {version for rollout in group.rollouts for version in rollout.policy_versions}
        if not versions:
            return True
        if not await self.receiver.wait_until_committed(max(versions), epoch, self.lease_s):
            return False
        return item.min_policy_version <= min(versions) and max(versions) <= item.max_policy_version

    async def _group(self, item: WorkItem) -> RolloutGroup:
        began = time.time()
        async with _timed(metrics.GENERATE_SECONDS.observe) as generate_seconds:
            sampled = await asyncio.gather(
                *(self.engine.sample(item.prompt_ids, item.sampling, seed, urgent=True) for seed in item.seeds)
            )
        tokens = sum(len(one.completion_ids) for one in sampled)
        self.tokens_generated += tokens
        metrics.TOKENS.inc(tokens)
        async with _timed(metrics.SCORE_SECONDS.observe) as score_seconds:
            texts = [self.decode(one.completion_ids) for one in sampled]
            self.scoring_since[item.group_id] = time.monotonic()
            try:
                scored = await self.reward.score(item.checker, texts, item.answer)
            finally:
                del self.scoring_since[item.group_id]
        return RolloutGroup(
            group_id=item.group_id,
            kind=item.kind,
            step=item.step,
            sampled_by=self.name,
            prompt_ids=item.prompt_ids,
            rollouts=[_rollout(*pair) for pair in zip(sampled, scored, strict=True)],
            generate_seconds=generate_seconds(),
            score_seconds=score_seconds(),
            began=began,
        )


def _rollout(sampled: Sampled, scored: Scored) -> Rollout:
    return Rollout(
        completion_ids=sampled.completion_ids,
        rollout_logprobs=sampled.logprobs,
        policy_versions=sampled.policy_versions,
        finish_reason=sampled.finish_reason,
        reward=scored.reward,
        parsed=scored.parsed,
        format_ok=scored.format_ok,
    )


@contextlib.asynccontextmanager
async def _timed(observe: Callable[[float], object]) -> AsyncIterator[Callable[[], float]]:
    start = time.perf_counter()
    elapsed = 0.0
    yield lambda: elapsed
    elapsed = time.perf_counter() - start
    observe(elapsed)
