"""The rollout service's side of the queue."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from retort.queues import replies
from retort.queues.connection import call_async
from retort.queues.protocol import (
    CONSUMER_GROUP,
    KINDS,
    LONGEST_BLOCK_S,
    BadEntry,
    Entry,
    Keys,
    Kind,
    Lease,
    Member,
    checksum,
)
from retort.queues.replies import Reply
from retort.rollouts import RolloutGroup, WorkItem


class RolloutQueue:
    """Takes work under leases and submits finished groups, for one replica.

    A lease ends `lease_s` seconds after it was taken or last renewed. The work then goes to another,
    or, after `max_deliveries` such deliveries, to the dead-letter stream.
    """

    def __init__(self, redis: Redis, run: str, replica: str, lease_s: float, max_deliveries: int) -> None:
        self._redis = redis
        self._keys = Keys(run)
        self._replica = replica
        self._lease_ms = int(lease_s * 1000)
        self._max_deliveries = max_deliveries

    async def declare(self) -> None:
        """Make the streams; any replica and the trainer may do so, in any order."""
        await self._call("declare")

    async def take(self, limit: int, block_s: float) -> list[Lease]:
        """Up to `limit` leases: training before validation, expired leases of others before new work.

        Waits up to `block_s` seconds (5 at most) when there is nothing. Undecodable work is buried.
        """
        reply = await self._call("take", self._replica, limit, self._lease_ms, self._max_deliveries)
        leases = await self._decode(replies.taken(reply))
        if leases or block_s <= 0:
            return leases
        leases = await self._decode((kind, 1, entry) for kind, entry in await self._wait_for_new(block_s))
        # COUNT is per stream: two items that came at the same moment are both ours now.
        for lease in leases[limit:]:
            await self.give_back(lease)
        return leases[:limit]

    async def renew(self, leases: Sequence[Lease]) -> list[Lease]:
        """Start the leases' time again. Returns those that were lost: others may have them now."""
        values = [value for lease in leases for value in (lease.item.kind, lease.entry_id)]
        lost = {replies.text(entry_id) for entry_id in await self._call("renew", self._replica, *values)}
        return [lease for lease in leases if lease.entry_id in lost]

    async def submit(self, lease: Lease, group: RolloutGroup) -> Literal["stored", "duplicate", "unknown"]:
        """Hand in a finished group and end its lease.

        `duplicate`: the group is there already, from another replica or from this call made twice.
        `unknown`: nobody awaits it any more. Neither is an error.
        """
        data = group.to_bytes()
        crc = checksum(group.group_id, data)
        outcome = await self._call("submit", group.kind, lease.entry_id, group.group_id, crc, data)
        return replies.submission(outcome)

    async def give_back(self, lease: Lease) -> None:
        """End a lease without a result and without blaming the work: it is available to others at once."""
        await self._call("give_back", lease.item.kind, lease.entry_id, self._replica, self._lease_ms)

    async def fail(self, lease: Lease, reason: str) -> None:
        """Say why this delivery failed, for the history of work that nobody can do. Its lease is left to run out."""
        await self._call("fail", lease.item.kind, lease.entry_id, self._replica, reason)

    async def bury(self, lease: Lease, reason: str) -> None:
        """Set work aside that cannot be done. The trainer will end the run, naming group and reason."""
        await self._call("bury", lease.item.kind, lease.entry_id, self._replica, "failed", reason)

    async def announce(self, member: Member) -> Literal["ok", "drain"]:
        """Write this replica into the members; `drain`: it is asked to finish what it has in hand and leave.

        Raises Evicted if the trainer struck off this process.
        """
        reply = await self._call("announce", self._replica, member.incarnation, member.to_bytes())
        return "drain" if replies.text(reply) == "drain" else "ok"

    async def leave(self) -> None:
        """Give back everything and strike this replica off the members."""
        await self._call("leave", self._replica, self._lease_ms)

    async def _wait_for_new(self, block_s: float) -> list[tuple[Kind, Entry]]:
        streams: dict[Any, Any] = {self._keys.work(kind): ">" for kind in KINDS}
        block_ms = int(min(block_s, LONGEST_BLOCK_S) * 1000) or None
        try:
            reply = await self._redis.xreadgroup(CONSUMER_GROUP, self._replica, streams, count=1, block=block_ms)
        except ResponseError as error:
            # An emptied Redis has lost its consumer groups; the next take makes them again.
            if replies.consumer_group_is_missing(error):
                return []
            raise
        return replies.entries(reply, self._keys)

    async def _decode(self, taken: Iterable[tuple[Kind, int, Entry]]) -> list[Lease]:
        leases = []
        for kind, deliveries, entry in taken:
            try:
                item = entry.decode(WorkItem)
            except BadEntry as bad:
                await self._call("bury", kind, entry.entry_id, self._replica, bad.cause, bad.reason)
            else:
                leases.append(Lease(entry_id=entry.entry_id, item=item, deliveries=deliveries))
        return leases

    async def _call(self, name: str, *args: str | bytes | int) -> Reply:
        try:
            return await call_async(self._redis, name, self._keys.of_functions(), *args)
        except ResponseError as error:
            raise replies.refusal(error, who=self._replica) from error
