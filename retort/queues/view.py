"""What an onlooker sees of a run (`retort status`, the live panel), and the request to stop it."""

from redis import Redis
from redis.exceptions import ResponseError

from retort.queues import replies
from retort.queues.connection import call
from retort.queues.protocol import CONSUMER_GROUP, DeadWork, InFlight, Keys, Kind, Member, Policy, checksum
from retort.rollouts import Message


class PendingLease(Message, frozen=True, kw_only=True):
    """A lease that somebody holds."""

    kind: Kind
    entry_id: str
    replica: str
    idle_s: float
    """Seconds since it was taken or last renewed."""
    deliveries: int


class RunView:
    """Reads the state of a run and writes nothing."""

    def __init__(self, redis: Redis, run: str) -> None:
        self._redis = redis
        self._keys = Keys(run)

    def progress(self) -> dict[str, str]:
        """What the trainer last said with `set_progress`; empty before."""
        return replies.texts(self._redis.hgetall(self._keys("progress")))

    def members(self) -> dict[str, Member]:
        """The rollout replicas by name, dead ones included. Times are by this host's clock, whatever theirs show."""
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.time()
            pipeline.hgetall(self._keys("members"))
            clock, members = pipeline.execute()
        return replies.members(members, clock)

    def policy(self) -> Policy | None:
        """The committed policy; None before the first."""
        return replies.policy(self._redis.hgetall(self._keys("policy")))

    def highest_epoch(self) -> int:
        """The highest trainer epoch seen; 0 in a new run."""
        return int(replies.text(self._redis.get(self._keys("fence")) or "0"))

    def dead(self) -> list[DeadWork]:
        """Everything that was ever set aside in this run, oldest first."""
        return replies.dead(self._redis.xrange(self._keys("dead")))

    def dead_bytes(self, entry_id: str) -> bytes:
        """What was set aside, as it lay in the queue. Raises LookupError if there is no such entry."""
        return replies.dead_bytes(self._redis.xrange(self._keys("dead"), entry_id, entry_id))

    def stop_requested(self) -> str | None:
        """Why the run should end, or None."""
        reason = self._redis.get(self._keys("stop"))
        return None if reason is None else replies.text(reason)

    def memory_share(self) -> float:
        """How much of its memory limit Redis uses; at 1 it takes no more work. 0 where it has none."""
        return replies.memory_share(self._redis.info("memory"))

    def in_flight(self, kind: Kind) -> InFlight:
        """How many groups of a kind are waiting, leased and finished."""
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.xlen(self._keys.work(kind))
            pipeline.xlen(self._keys.groups(kind))
            pipeline.exists(self._keys.work(kind))
            queued, finished, exists = pipeline.execute()
        leased = 0
        if exists:
            leased = replies.pending_count(self._redis.xpending(self._keys.work(kind), CONSUMER_GROUP))
        return InFlight(waiting=max(queued - leased, 0), leased=leased, finished=finished)

    def oldest_lease(self, kind: Kind) -> PendingLease | None:
        """The lease on the oldest work, with who holds it; None when nothing is leased."""
        stream = self._keys.work(kind)
        if not self._redis.exists(stream):
            return None
        reply = self._redis.xpending_range(stream, CONSUMER_GROUP, "-", "+", 1)
        return next((PendingLease(kind=kind, **lease) for lease in replies.pending(reply)), None)


def request_stop(redis: Redis, run: str, reason: str) -> None:
    """Ask the trainer to finish its step, save and end."""
    call(redis, "stop", Keys(run).of_functions(), reason)


def clear_stop(redis: Redis, run: str) -> None:
    """Forget the request to stop, before a run is resumed."""
    redis.delete(Keys(run)("stop"))


def request_drain(redis: Redis, run: str, member: Member) -> None:
    """Ask a replica to take no more work, finish what it has in hand and leave."""
    call(redis, "drain", Keys(run).of_functions(), member.name, member.incarnation)


def evict(redis: Redis, run: str, member: Member) -> None:
    """Strike a replica off the members on behalf of the present trainer. Raises Fenced if a new one takes over now."""
    epoch = RunView(redis, run).highest_epoch()
    try:
        call(redis, "evict", Keys(run).of_functions(), epoch, member.name, member.incarnation)
    except ResponseError as error:
        raise replies.refusal(error, epoch=epoch) from error


def replay_dead(redis: Redis, run: str, entry_id: str) -> bool:
    """Put work that was set aside back into its queue, as if it were new. False if its group is there already.

    Raises RedisFull.
    """
    view, keys = RunView(redis, run), Keys(run)
    work = next(work for work in view.dead() if work.entry_id == entry_id)
    crc = checksum(work.group_id, view.dead_bytes(entry_id))
    try:
        return bool(call(redis, "replay", keys.of_functions(), entry_id, crc))
    except ResponseError as error:
        raise replies.refusal(error) from error


def drop_dead(redis: Redis, run: str, entry_id: str) -> None:
    """Forget an entry that was set aside."""
    redis.xdel(Keys(run)("dead"), entry_id)
