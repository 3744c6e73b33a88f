"""Redis replies become our values here and nowhere else; redis-py types them as unions of everything."""

import functools
import logging
import time
from typing import Any, Literal, TypeAlias

import msgspec
from redis.exceptions import OutOfMemoryError, ResponseError

from retort.disk import DiskFullError
from retort.queues.protocol import Attempt, DeadWork, Entry, Evicted, Fenced, Keys, Kind, Member, Policy, RedisFull
from retort.telemetry import log_event

Reply: TypeAlias = Any
"""Whatever redis-py returned."""


def text(reply: Reply) -> str:
    return reply.decode() if isinstance(reply, bytes) else str(reply)


def kind(reply: Reply) -> Kind:
    return "train" if reply == b"train" else "validation"


def outcome(reply: Reply) -> Literal["new", "issued", "submitted"]:
    return "new" if reply == b"new" else "issued" if reply == b"issued" else "submitted"


def submission(reply: Reply) -> Literal["stored", "duplicate", "unknown"]:
    return "stored" if reply == b"stored" else "duplicate" if reply == b"duplicate" else "unknown"


def texts(reply: Reply) -> dict[str, str]:
    """A hash of strings."""
    return {text(name): text(value) for name, value in reply.items()}


def members(reply: Reply, clock: Reply) -> dict[str, Member]:
    """The hash `members`. `clock`: Redis' answer to TIME, taken with it."""
    ahead = clock[0] + clock[1] / 1e6 - time.time()
    found = {}
    for name, data in reply.items():
        try:
            found[text(name)] = _member(data, ahead)
        except (msgspec.DecodeError, ValueError) as error:
            # One replica of another version, or a hand in Redis, must not end those who look at all of them.
            _say_unreadable(repr(name), str(error))
    return found


@functools.lru_cache(maxsize=64)  # once for each replica: members are looked at every second
def _say_unreadable(name: str, reason: str) -> None:
    log_event("member_unreadable", logging.WARNING, replica=name, reason=reason)


def _member(data: bytes, ahead: float) -> Member:
    """With the times of its own clock as this process' clock shows them, of which Redis' is `ahead` by seconds."""
    if not data[:1].isdigit():
        return Member.from_bytes(data)  # from a replica of an older version, which has no clock but its own
    stamp, _, packed = data.partition(b" ")
    member, heard = Member.from_bytes(packed), float(stamp) - ahead
    finished = heard - (member.updated - member.last_finished) if member.last_finished else 0.0
    return msgspec.structs.replace(member, updated=heard, last_finished=finished)


def policy(reply: Reply) -> Policy | None:
    """The hash `policy`."""
    if not reply:
        return None
    return Policy(epoch=int(reply[b"epoch"]), version=int(reply[b"version"]), digest=text(reply[b"digest"]))


def memory_share(reply: Reply) -> float:
    """Of the memory limit, from INFO; 0 without one."""
    return float(reply["used_memory"] / reply["maxmemory"]) if reply["maxmemory"] else 0.0


def pending_count(reply: Reply) -> int:
    """The answer of XPENDING without a range."""
    return int(reply["pending"])


def pending(reply: Reply) -> list[dict[str, Any]]:
    """The answer of XPENDING with a range, as fields of PendingLease."""
    return [
        {
            "entry_id": text(found["message_id"]),
            "replica": text(found["consumer"]),
            "idle_s": found["time_since_delivered"] / 1000,
            "deliveries": found["times_delivered"],
        }
        for found in reply
    ]


def entry(entry_id: Reply, fields: Reply) -> Entry:
    return Entry(text(entry_id), text(fields[b"group_id"]), text(fields[b"crc"]), fields[b"data"])


def entries(reply: Reply, keys: Keys) -> list[tuple[Kind, Entry]]:
    """The answer of XREAD or XREADGROUP."""
    return [
        (keys.kind_of(text(stream)), entry(entry_id, fields))
        for stream, stream_entries in reply or []
        for entry_id, fields in stream_entries
    ]


def taken(reply: Reply) -> list[tuple[Kind, int, Entry]]:
    """The answer of the function `take`: kind, deliveries, entry."""
    return [
        (kind(name), int(deliveries), Entry(text(entry_id), text(group_id), text(crc), data))
        for name, entry_id, deliveries, group_id, crc, data in reply
    ]


def dead(reply: Reply) -> list[DeadWork]:
    """The answer of XRANGE on `dead`."""
    found = []
    for entry_id, fields in reply:
        values = {text(name): value for name, value in fields.items() if name != b"data"}
        found.append(
            DeadWork(
                entry_id=text(entry_id),
                kind=kind(values["kind"]),
                group_id=text(values["group_id"]),
                reason=text(values["reason"]),
                cause="failed" if values["cause"] == b"failed" else "corrupt",
                epoch=int(values["epoch"]),
                attempts=_attempts(values.get("history")),
            )
        )
    return found


def _attempts(history: Reply) -> tuple[Attempt, ...]:
    return msgspec.msgpack.decode(history, type=tuple[Attempt, ...]) if history else ()


def dead_bytes(reply: Reply) -> bytes:
    """The data of the one entry in an answer of XRANGE on `dead`."""
    return bytes(reply[0][1][b"data"])


def library_is_missing(error: ResponseError) -> bool:
    return "Function not found" in str(error)


def library_is_there(error: ResponseError) -> bool:
    return "already exists" in str(error)


def consumer_group_is_missing(error: ResponseError) -> bool:
    # UNBLOCKED is what a waiting read gets when its stream is deleted under it, as by FLUSHALL.
    return str(error).startswith(("NOGROUP", "UNBLOCKED"))


def refusal(error: ResponseError, *, epoch: int = 0, who: str = "") -> Exception:
    """The exception that a function's error reply stands for."""
    code, _, rest = str(error).partition(" ")
    if code == "FENCED":
        return Fenced(epoch, int(rest))
    if code == "MISCONF":
        return DiskFullError(
            f"disk full: Redis cannot write its append-only file ({rest}). What was saved before is whole. Make room, "
            "then go on with --resume."
        )
    if isinstance(error, OutOfMemoryError):
        return RedisFull("Redis is at its memory limit (maxmemory)")
    if code == "EVICTED":
        return Evicted(f"{who} was evicted by the trainer; it must restart")
    return error
