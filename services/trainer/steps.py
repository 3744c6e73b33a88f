"""Where a training step's data comes from: admission, the wait for its groups, and the same batch on every rank."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

import msgspec

from retort.config import RunConfig
from retort.queues import RedisFull, TrainerQueue
from retort.rollouts import RolloutGroup, WorkItem
from retort.telemetry import log_event
from services.trainer.admission import GroupReader, StalledError, WorkList
from services.trainer.batch import StepBatch
from services.trainer.journal import Journal
from services.trainer.methods import method_of
from services.trainer.ranks import broadcast_bytes
from services.trainer.weight_sender import WeightSender

MAX_REFILLS = 3
"""Then a step is made up with groups that teach nothing: their share of the loss is 0, its denominator stays."""
TICK, TICK_EVERY_S = b"still waiting", 20.0
DONE, YES = b"", b"yes"
NEARLY_FULL = 0.8
"""Share of Redis' memory limit from which on groups leave it after every step, and work is not asked for ahead."""
LOOK_AGAIN_S = 0.2
STOP_PATIENCE_S = 10.0
"""A request to stop lets a step finish, unless nothing has come for so long."""
Assemble = Callable[[int, list[RolloutGroup]], StepBatch]


class StopRequested(Exception):
    """The run was asked to stop while the trainer waited for something that does not come."""


class Steps:
    """The steps of a run as batches. `take` and `validate` are collectives; rank 0 has a queue, as `Rank0Steps`."""

    def __init__(self, assemble: Assemble) -> None:
        self._assemble = assemble

    def take(self, step: int) -> Iterator[StepBatch]:
        """The step's data: whole updates as they arrive, or all at once. Nothing when the run was asked to stop."""
        while (groups := _follow()) != DONE:
            yield self._assemble(step, msgspec.msgpack.decode(groups, type=list[RolloutGroup]))

    def validate(self, version: int, *, at_once: bool) -> float | None:
        """Ask the validation questions of the policy version that is served, unless that has been done.

        Answers its avg@n over all questions if it was waited for: `at_once`, or when only one replica is there. Else
        the questions are sampled beside the next step, and `finish_validation` has it. None if not rank 0.
        """
        _follow()
        return None

    def finish_validation(self) -> float | None:
        """Wait for the validation that goes on, if any: its avg@n. To be called before another version is served."""
        _follow()
        return None

    def release(self, version: int) -> None:
        """Let go of the groups that a durable checkpoint of `version` contains."""

    def should_save(self) -> bool:
        """Whether Redis is so full that the groups of this step had better be made durable and leave. A collective."""
        return _follow() == YES


def _follow() -> bytes:
    """What rank 0 says when it has done waiting. Its ticks keep this wait shorter than the ranks' timeout."""
    while (data := broadcast_bytes(b"")) == TICK:
        pass
    return data


class Rank0Steps(Steps):
    """Admits work within the staleness bound and collects what comes back."""

    def __init__(
        self,
        assemble: Assemble,
        config: RunConfig,
        *,
        work: WorkList,
        queue: TrainerQueue,
        sender: WeightSender,
        journal: Journal,
        stop_requested: Callable[[], bool],
    ) -> None:
        super().__init__(assemble)
        self._config = config
        self._work = work
        self._queue = queue
        self._sender = sender
        self._journal = journal
        self._stop_requested = stop_requested
        self._last_tick = time.monotonic()
        self._has_begun = False
        self._pending: tuple[int, list[WorkItem]] | None = None
        self._train = GroupReader(queue, "train", self._idle, config.timeouts.stall_s)
        self._validation = GroupReader(queue, "validation", self._idle, config.timeouts.stall_s)

    def take(self, step: int) -> Iterator[StepBatch]:
        try:
            for groups in () if self._stop_requested() else self._parts(step):
                broadcast_bytes(msgspec.msgpack.encode(groups))
                yield self._assemble(step, groups)
                self._has_begun = True
        except StopRequested:
            pass
        self._has_begun = False
        broadcast_bytes(DONE)

    def validate(self, version: int, *, at_once: bool) -> float | None:
        try:
            if self._journal.is_validated(version):
                return None
            # Its work waits in the queue for the version, which may still be on its way to them.
            replicas = self._wait_for_a_replica(self._oldest(version))
            self._pending = version, self._work.of_validation(version)
            self._issue(self._pending[1])
            goes_first = at_once or replicas == 1 or self._config.trainer.deterministic
            return self._collect_validation() if goes_first else None
        except StopRequested:
            return None
        finally:
            broadcast_bytes(DONE)

    def finish_validation(self) -> float | None:
        try:
            return self._collect_validation() if self._pending else None
        except StopRequested:
            # Nothing came, and the user wants to stop; the next version will be saved, so nobody asks for this again.
            log_event("validation_given_up", logging.WARNING, reason="asked to stop while its groups did not come")
            return None
        finally:
            broadcast_bytes(DONE)

    def _collect_validation(self) -> float:
        assert self._pending, "collected before it was asked for"
        (version, items), self._pending = self._pending, None
        waiting_for = f"{len(items)} validation groups of version {version}; training goes on when they are there"
        with self._journal.timing("validation", waiting_for=waiting_for):
            groups = self._validation.collect(items)
        self._journal.keep_validation(version, [(group, self._work.question(group)) for group in groups])
        self._validation.release(lambda _: True)
        return fmean(rollout.reward for group in groups for rollout in group.rollouts)

    def release(self, version: int) -> None:
        self._train.release(lambda group: group.step <= version)

    def should_save(self) -> bool:
        share = self._queue.memory_share()
        if share > NEARLY_FULL:
            log_event("redis_nearly_full", logging.WARNING, share=share, action="saving, so that groups leave it")
        broadcast_bytes(YES if share > NEARLY_FULL else DONE)
        return share > NEARLY_FULL

    def _parts(self, step: int) -> Iterator[list[RolloutGroup]]:
        """The step's groups in whole updates, in the order of their arrival; or all of them, in slot order."""
        self._wait_for_a_replica(self._oldest(step - 1))
        items = self._admit(step)
        # What replaces groups has to see all of them first.
        refills = method_of(self._config.method).parts.refill
        is_streamed = self._config.trainer.is_streamed and not refills
        streamed = self._train.arrivals(items, self._config.trainer.groups_per_update)
        parts = streamed if is_streamed else self._whole(step, items, refills)
        while True:
            with self._journal.timing("wait_groups", waiting_for=f"the groups of step {step}", step=step):
                part = next(parts, None)
            if part is None:
                return
            yield part

    def _admit(self, step: int) -> list[WorkItem]:
        """Ask for the groups of the step, and of as many more as may be sampled ahead of it while Redis has room."""
        items = self._work.of_step(step)
        self._issue(items)
        last = min(step + self._config.trainer.max_staleness, self._config.trainer.steps)
        for ahead in range(step + 1, last + 1):
            if self._queue.memory_share() < NEARLY_FULL:
                self._issue(self._work.of_step(ahead))
        return items

    def _issue(self, items: Sequence[WorkItem]) -> None:
        """Queue work; at Redis' memory limit wait until it has room. Raises StalledError, StopRequested."""
        if self._is_issued(items):
            return
        started = time.monotonic()
        with self._journal.timing("wait_redis", waiting_for="room in Redis, which is at its memory limit"):
            while not self._is_issued(items):
                waited_s = time.monotonic() - started
                self._idle(waited_s)
                if waited_s > self._config.timeouts.stall_s:
                    raise StalledError(
                        f"Redis has been at its memory limit for {waited_s:.0f} s (timeouts.stall_s), so {len(items)} "
                        "work items cannot be admitted. Raise its maxmemory, or remove what else it holds; then "
                        "--resume."
                    )
                time.sleep(LOOK_AGAIN_S)

    def _is_issued(self, items: Sequence[WorkItem]) -> bool:
        try:
            self._queue.issue(items)
        except RedisFull:
            return False
        return True

    def _whole(self, step: int, items: Sequence[WorkItem], refills: bool) -> Iterator[list[RolloutGroup]]:
        groups = self._train.collect(items)
        yield self._refill(step, groups) if refills else groups

    def _refill(self, step: int, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        """Replace groups whose rewards are all equal by groups of other questions, a few times at most."""
        for attempt in range(1, MAX_REFILLS + 1):
            teaching = [group for group in groups if len({rollout.reward for rollout in group.rollouts}) > 1]
            idle = [group for group in groups if group not in teaching]
            items = self._work.refill(step, attempt, len(idle)) if idle else []
            self._issue(items)
            groups = teaching + self._train.collect(items) + idle[len(items) :]
        return groups

    def _idle(self, waited_s: float) -> None:
        """While waiting: show a sign of life, and bring replicas that (re)joined to the policy."""
        self._journal.beat()
        self._sender.start_sync()
        # A step of which an update has been made is finished: half of it could not be saved.
        if waited_s > STOP_PATIENCE_S and not self._has_begun and self._stop_requested():
            raise StopRequested
        if time.monotonic() - self._last_tick > TICK_EVERY_S:
            broadcast_bytes(TICK)
            self._last_tick = time.monotonic()

    def _oldest(self, version: int) -> int:
        """Version that may still be served when `version` is the newest."""
        return max(0, version - self._config.trainer.max_staleness)

    def _wait_for_a_replica(self, oldest: int) -> int:
        """How many replicas serve version `oldest` or a newer one; at least one."""
        if replicas := self._sender.start_sync(oldest):
            return replicas
        startup_s = self._config.timeouts.startup_s
        with self._journal.timing("wait_replica", waiting_for="a rollout replica"):
            started = time.monotonic()
            while not (replicas := self._sender.sync()):
                self._idle(time.monotonic() - started)
                if time.monotonic() - started > startup_s:
                    raise StalledError(
                        f"trainer waits for a rollout replica to serve policy version {oldest}, and none did within "
                        f"{startup_s:.0f} s (timeouts.startup_s). See logs/rollout-*.log."
                    )
                time.sleep(LOOK_AGAIN_S)
            return replicas
