"""The trainer's side of the queue."""

from collections.abc import Sequence
from typing import Literal

from redis import Redis
from redis.exceptions import ResponseError

from retort.queues import replies
from retort.queues.connection import call
from retort.queues.protocol import LONGEST_BLOCK_S, BadEntry, DeadWork, InFlight, Keys, Kind, Member, checksum
from retort.queues.replies import Reply
from retort.queues.view import RunView
from retort.rollouts import RolloutGroup, WorkItem


class TrainerQueue:
    """Issues work, reads finished groups, and is the only side that removes them.

    `epoch` is the fencing token: it must be higher than that of every earlier trainer of the run. Once a newer
    trainer has opened the queue, every method that writes protocol state raises `Fenced`.
    """

    def __init__(self, redis: Redis, run: str, epoch: int) -> None:
        self._redis = redis
        self._keys = Keys(run)
        self._epoch = epoch
        self._view = RunView(redis, run)

    def open(self) -> None:
        """Take over the run: from now on every trainer with a lower epoch is fenced out."""
        self._call("open")

    def issue(self, items: Sequence[WorkItem]) -> list[Literal["new", "issued", "submitted"]]:
        """Queue work, all or nothing. An item that is known already is left alone. Says which, per item.

        A waiting trainer should call this again with everything it still awaits: what Redis forgot, or what
        was quarantined, is issued again then. Raises RedisFull.
        """
        if not items:
            return []
        values: list[str | bytes] = []
        for item in items:
            data = item.to_bytes()
            values += [item.kind, item.group_id, checksum(item.group_id, data), data]
        return [replies.outcome(found) for found in self._call("issue", *values)]

    def read_groups(self, kind: Kind, cursor: str, block_s: float, limit: int) -> list[tuple[str, RolloutGroup]]:
        """Up to `limit` finished groups after `cursor` ("0": from the start), oldest first, with entry ids.

        Waits up to `block_s` seconds (5 at most) for one. Nothing is removed: the next cursor is the last
        entry id. Damaged entries are quarantined and not returned.
        After Redis lost its last seconds a group can come twice, under two entry ids: the caller trains on
        one of them and hands both to `commit`.
        """
        block_ms = int(min(block_s, LONGEST_BLOCK_S) * 1000) or None
        reply = self._redis.xread({self._keys.groups(kind): cursor}, count=limit, block=block_ms)
        groups = []
        for _, entry in replies.entries(reply, self._keys):
            try:
                groups.append((entry.entry_id, entry.decode(RolloutGroup)))
            except BadEntry as bad:
                self._call("quarantine", kind, entry.entry_id, bad.cause, bad.reason)
        return groups

    def publish(self, version: int, digest: str) -> None:
        """Declare a policy version committed. Versions of one epoch never fall."""
        self._call("publish", version, digest)

    def commit(self, kind: Kind, entries: Sequence[tuple[str, str]]) -> int:
        """Remove groups, given as (entry id, group id), that are in a durable checkpoint. Says how many."""
        if not entries:
            return 0
        return int(self._call("commit", kind, *(value for entry in entries for value in entry)))

    def withdraw(self, kind: Kind) -> int:
        """Forget all work and all groups of a kind. Says how many.

        For validation, which a trainer that resumes from a checkpoint asks for again: work pinned to a version that is
        not reached yet would otherwise keep replicas waiting.
        """
        return int(self._call("withdraw", kind))

    def withdraw_later(self, step: int) -> int:
        """Forget training work of steps after `step`, for a trainer that resumes from before them. Says how much.

        They are issued again when their time has come; groups that are finished stay.
        """
        return int(self._call("withdraw_later", step))

    def dead(self) -> list[DeadWork]:
        """Work that failed for good under this trainer; without it no step can be finished."""
        return [work for work in self._view.dead() if work.cause == "failed" and work.epoch == self._epoch]

    def members(self) -> dict[str, Member]:
        """The rollout replicas by name. One that is not `alive` stays listed until it is evicted."""
        return self._view.members()

    def evict(self, member: Member) -> None:
        """Strike this process off the members; it learns it at its next announcement and has to restart."""
        self._call("evict", member.name, member.incarnation)

    def set_progress(self, **fields: str | int | float) -> None:
        """Say what the trainer is doing, for `retort status` and the live panel."""
        values = [text for name, value in fields.items() for text in (name, str(value))]
        try:
            call(self._redis, "set_progress", self._keys.of_functions(), *values)
        except ResponseError as error:
            raise replies.refusal(error) from error

    def stop_requested(self) -> str | None:
        """Why the run should end after this step, or None."""
        return self._view.stop_requested()

    def memory_share(self) -> float:
        """How much of its memory limit Redis uses; 0 where it has none."""
        return self._view.memory_share()

    def in_flight(self, kind: Kind) -> InFlight:
        """How many groups of a kind are waiting, leased and finished."""
        return self._view.in_flight(kind)

    def _call(self, name: str, *args: str | bytes | int) -> Reply:
        try:
            return call(self._redis, name, self._keys.of_functions(), self._epoch, *args)
        except ResponseError as error:
            raise replies.refusal(error, epoch=self._epoch) from error
