"""Which question belongs to which step, and the wait for its finished groups. Rank 0 only."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from retort.config import RunConfig
from retort.questions import Question
from retort.queues import Kind, RedisFull, TrainerQueue
from retort.rollouts import RolloutGroup, SamplingParameters, WorkItem, sample_seed

POLL_S = 1.0
"""Groups wake the reader at once; so often it looks after everything else."""
ISSUE_AGAIN_S = 15.0


class StalledError(Exception):
    """Nothing came for too long, or cannot come any more. Its text says who is missing. Exit code 4."""


class GivenUpError(StalledError):
    """Work was set aside, because a completion is unscorable or because it failed too often. Exit code 4, too."""

    def __init__(self, item: WorkItem, reason: str) -> None:
        super().__init__(f"group {item.group_id} was given up: {reason}. Its work is in the dead-letter stream.")
        self.item, self.reason = item, reason


def data_indices(step: int, *, num_questions: int, groups_per_step: int, seed: int) -> tuple[int, list[int]]:
    """Epoch and questions of a step: a new permutation each epoch, its last partial batch dropped.

    A function of the step alone, so that a resumed run needs no cursor.
    """
    steps_per_epoch = num_questions // groups_per_step
    epoch, position = divmod(step - 1, steps_per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(num_questions)
    return epoch, order[position * groups_per_step : (position + 1) * groups_per_step].tolist()


@dataclass
class WorkList:
    """Turns questions into work items. Group ids are a function of epoch and question, so issuing twice is harmless."""

    config: RunConfig
    train: Sequence[Question]
    validation: Sequence[Question]
    encode: Callable[[Question], list[int]]

    def of_step(self, step: int) -> list[WorkItem]:
        """The groups of a training step, in slot order."""
        epoch, indices = self._indices(step)
        return [self._train_item(f"{epoch}-{index:06d}", step, index) for index in indices]

    def refill(self, step: int, attempt: int, count: int) -> list[WorkItem]:
        """Up to `count` other questions for a step, for groups that teach nothing; another draw at every attempt."""
        epoch, used = self._indices(step)
        others = np.setdiff1d(np.arange(len(self.train)), used)
        draw = np.random.default_rng([self.config.seed, step, attempt])
        drawn = draw.choice(others, min(count, len(others)), replace=False)
        return [self._train_item(f"{epoch}-s{step}r{attempt}-{index:06d}", step, index) for index in drawn.tolist()]

    def of_validation(self, version: int) -> list[WorkItem]:
        """The validation questions, to be sampled by one policy version."""
        settings = self.config.validation
        sampling = SamplingParameters(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_completion_tokens=self.config.sampling.max_completion_tokens,
        )
        return [
            self._item(f"v{version}-{q.index:06d}", "validation", version, version, q, sampling, settings.samples)
            for q in self.validation
        ]

    def question(self, group: RolloutGroup | WorkItem) -> Question:
        """What the group was asked."""
        questions = self.train if group.kind == "train" else self.validation
        return questions[int(group.group_id.rpartition("-")[2])]

    def _indices(self, step: int) -> tuple[int, list[int]]:
        return data_indices(
            step,
            num_questions=len(self.train),
            groups_per_step=self.config.trainer.groups_per_step,
            seed=self.config.seed,
        )

    def _train_item(self, group_id: str, step: int, index: int) -> WorkItem:
        config = self.config
        sampling = SamplingParameters(
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            max_completion_tokens=config.sampling.max_completion_tokens,
        )
        oldest = max(0, step - 1 - config.trainer.max_staleness)
        return self._item(group_id, "train", step, oldest, self.train[index], sampling, config.trainer.group_size)

    def _item(
        self,
        group_id: str,
        kind: Kind,
        step: int,
        min_policy_version: int,
        question: Question,
        sampling: SamplingParameters,
        group_size: int,
    ) -> WorkItem:
        # Every validation draws with the same seeds: before and after differ by the weights alone.
        seeded_by = group_id if kind == "train" else f"validation-{question.index}"
        return WorkItem(
            group_id=group_id,
            kind=kind,
            step=step,
            min_policy_version=min_policy_version,
            prompt_ids=self.encode(question),
            group_size=group_size,
            seeds=[sample_seed(self.config.seed, seeded_by, sample) for sample in range(group_size)],
            sampling=sampling,
            checker=self.config.data.checker,
            answer=question.answer,
        )


@dataclass
class GroupReader:
    """Collects finished groups of one kind from the stream, however they arrive."""

    queue: TrainerQueue
    kind: Kind
    idle: Callable[[float], None]
    """Called while waiting, with the seconds since something last came: keeps replicas current."""
    stall_s: float
    _cursor: str = "0"
    _groups: dict[str, RolloutGroup] = field(default_factory=dict)
    _entries: dict[str, list[str]] = field(default_factory=dict)

    def collect(self, items: Sequence[WorkItem]) -> list[RolloutGroup]:
        """Wait for all of the items' groups; in the items' order, whatever order they arrived in.

        Raises StalledError, naming what is missing, when none arrives for `stall_s` or one has been given up.
        """
        for _ in self.arrivals(items, len(items)):
            pass
        return [self._groups[item.group_id] for item in items]

    def arrivals(self, items: Sequence[WorkItem], size: int) -> Iterator[list[RolloutGroup]]:
        """The items' groups as they arrive: each time all that are there, in a multiple of `size`.

        After a restart they come in the same order again. Raises as `collect` does.
        """
        awaited = {item.group_id: item for item in items}
        while awaited:
            arrived = self._wait_for(awaited, size)
            yield [self._groups[group_id] for group_id in arrived]
            for group_id in arrived:
                del awaited[group_id]

    def _wait_for(self, awaited: Mapping[str, WorkItem], size: int) -> list[str]:
        last_arrival = asked = time.monotonic()
        while len(there := [group_id for group_id in self._groups if group_id in awaited]) < size:
            missing = [item for group_id, item in awaited.items() if group_id not in self._groups]
            arrived = self.queue.read_groups(self.kind, self._cursor, POLL_S, len(missing))
            for entry_id, group in arrived:
                self._cursor = entry_id
                self._groups[group.group_id] = group
                self._entries.setdefault(group.group_id, []).append(entry_id)
            now = time.monotonic()
            last_arrival = now if arrived else last_arrival
            self.idle(now - last_arrival)
            if arrived:
                continue
            self._give_up_on_dead(missing)
            if now - asked > ISSUE_AGAIN_S:
                # What Redis forgot, or what arrived damaged, is asked for again; the rest is left alone.
                with contextlib.suppress(RedisFull):  # there it is sampled as long as it takes, or asked for later
                    self.queue.issue(missing)
                asked = now
            if now - last_arrival > self.stall_s:
                raise StalledError(self._stalled(missing))
        return there[: len(there) // size * size]

    def release(self, is_done: Callable[[RolloutGroup], bool]) -> None:
        """Let the groups leave Redis that a durable checkpoint has made unnecessary."""
        done = [group_id for group_id, group in self._groups.items() if is_done(group)]
        self.queue.commit(self.kind, [(entry, group_id) for group_id in done for entry in self._entries[group_id]])
        for group_id in done:
            del self._groups[group_id], self._entries[group_id]

    def _give_up_on_dead(self, missing: Sequence[WorkItem]) -> None:
        items = {item.group_id: item for item in missing}
        for work in self.queue.dead():
            if work.group_id in items:
                raise GivenUpError(items[work.group_id], work.reason)

    def _stalled(self, missing: Sequence[WorkItem]) -> str:
        members = self.queue.members().values()
        replicas = ", ".join(f"{m.name} {m.state}, heard of {time.time() - m.updated:.0f} s ago" for m in members)
        flight = self.queue.in_flight(self.kind)
        return (
            f"trainer waits for {len(missing)} {self.kind} groups (first {missing[0].group_id}) and none came for "
            f"{self.stall_s:.0f} s; {flight.waiting} wait for a replica, {flight.leased} are being sampled; "
            f"replicas: {replicas or 'none'}"
        )
