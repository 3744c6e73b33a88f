"""Where a training step's data comes from: admission, the wait for its groups, and the same batch on every rank."""

import time
from collections.abc import Callable
from statistics import fmean

import msgspec

from retort.config import RunConfig
from retort.queues import TrainerQueue
from retort.rollouts import RolloutGroup
from services.trainer.admission import GroupReader, StalledError, WorkList
from services.trainer.batch import StepBatch
from services.trainer.journal import Journal
from services.trainer.methods import method_of
from services.trainer.ranks import broadcast_bytes
from services.trainer.weight_sender import WeightSender

MAX_REFILLS = 3
"""Then a step is made up with groups that teach nothing: their share of the loss is 0, its denominator stays."""
Assemble = Callable[[int, list[RolloutGroup]], StepBatch]


class Steps:
    """The steps of a run as batches. `take` is a collective; rank 0 alone has a queue, as `Rank0Steps`."""

    def __init__(self, assemble: Assemble) -> None:
        self._assemble = assemble

    def take(self, step: int) -> StepBatch | None:
        """The step's data, or None when the run was asked to stop."""
        data = broadcast_bytes(self._collect(step))
        if not data:
            return None
        return self._assemble(step, msgspec.msgpack.decode(data, type=list[RolloutGroup]))

    def validate(self, version: int) -> float | None:
        """Measure a policy version on the validation questions: its avg@n over all of them; None if not rank 0."""
        return None

    def release(self, version: int) -> None:
        """Let go of the groups that a durable checkpoint of `version` contains."""

    def _collect(self, step: int) -> bytes:
        return b""


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
        self._train = GroupReader(queue, "train", self._idle, config.timeouts.stall_s)
        self._validation = GroupReader(queue, "validation", self._idle, config.timeouts.stall_s)

    def validate(self, version: int) -> float:
        items = self._work.of_validation(version)
        self._wait_for_a_replica(version)
        with self._journal.timing("validation", waiting_for=f"{len(items)} validation groups of version {version}"):
            self._queue.issue(items)
            groups = self._validation.collect(items)
        self._journal.keep_validation(version, [(group, self._work.question(group)) for group in groups])
        self._validation.release(lambda _: True)
        return fmean(rollout.reward for group in groups for rollout in group.rollouts)

    def release(self, version: int) -> None:
        self._train.release(lambda group: group.step <= version)

    def _collect(self, step: int) -> bytes:
        if self._stop_requested():
            return b""
        self._wait_for_a_replica(step - 1)
        with self._journal.timing("wait_groups", waiting_for=f"the groups of step {step}", step=step):
            last = min(step + self._config.trainer.max_staleness, self._config.trainer.steps)
            for admitted in range(step, last + 1):
                self._queue.issue(self._work.of_step(admitted))
            groups = self._train.collect(self._work.of_step(step))
            if method_of(self._config.method).parts.refill:
                groups = self._refill(step, groups)
        return msgspec.msgpack.encode(groups)

    def _refill(self, step: int, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        """Replace groups whose rewards are all equal by groups of other questions, a few times at most."""
        for attempt in range(1, MAX_REFILLS + 1):
            teaching = [group for group in groups if len({rollout.reward for rollout in group.rollouts}) > 1]
            idle = [group for group in groups if group not in teaching]
            items = self._work.refill(step, attempt, len(idle)) if idle else []
            self._queue.issue(items)
            groups = teaching + self._train.collect(items) + idle[len(items) :]
        return groups

    def _idle(self) -> None:
        """While waiting: show a sign of life, and bring replicas that (re)joined to the policy."""
        self._journal.beat()
        self._sender.sync()

    def _wait_for_a_replica(self, version: int) -> None:
        if self._sender.sync():
            return
        startup_s = self._config.timeouts.startup_s
        with self._journal.timing("wait_replica", waiting_for="a rollout replica"):
            deadline = time.monotonic() + startup_s
            while not self._sender.sync():
                self._journal.beat()
                if time.monotonic() > deadline:
                    raise StalledError(
                        f"trainer waits for a rollout replica to serve policy version {version}, and none did within "
                        f"{startup_s:.0f} s (timeouts.startup_s). See logs/rollout-*.log."
                    )
                time.sleep(0.2)
