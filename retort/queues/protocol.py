"""Key names, function names and values of the queue's protocol. Nothing here holds a connection."""

import hashlib
import zlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal, TypeVar

import msgspec

from retort.rollouts import Message, WorkItem

Kind = Literal["train", "validation"]
KINDS: tuple[Kind, ...] = ("train", "validation")
CONSUMER_GROUP = "rollout"

LONGEST_BLOCK_S = 5.0
"""A blocking read returns after so long at the latest, well within the socket timeout."""

M = TypeVar("M", bound=Message)


class Fenced(Exception):
    """A newer trainer has taken over the run. The caller must end without writing a checkpoint."""

    def __init__(self, epoch: int, highest: int) -> None:
        super().__init__(f"trainer epoch {epoch} was replaced by epoch {highest}; this trainer must stop")
        self.epoch = epoch
        self.highest = highest


class RedisFull(Exception):
    """Redis has reached its memory limit (maxmemory) and takes no more work until groups have left it."""


class Evicted(Exception):
    """The trainer went on without this process. It must restart and join as a new incarnation."""


class Member(Message, frozen=True, kw_only=True):
    """One running replica of the rollout service, as it describes itself."""

    name: str
    pid: int
    host: str
    control_url: str
    """Where the trainer reaches the replica for weight syncs."""
    http_url: str
    """Where people reach it."""
    policy_version: int | None
    """The version it serves; None before its first weights were verified."""
    state: Literal["loading", "joining", "serving", "updating", "draining"]
    incarnation: str
    """UUID of the process: a restarted replica keeps its name and changes this."""
    groups_in_hand: int
    tokens_generated: int
    waiting_for: str
    updated: float
    """When this was written, in seconds since 1970 by the writer's clock; as read, when it came by the reader's."""
    groups_finished: int = 0
    """By this process."""
    last_finished: float = 0.0
    """When it finished the last of them; 0 before the first."""

    def alive(self, now: float, limit_s: float) -> bool:
        """Whether it was heard of within the last `limit_s` seconds."""
        return now - self.updated <= limit_s


class Policy(Message, frozen=True, kw_only=True):
    """A committed policy: which trainer, which version, which bits."""

    epoch: int
    version: int
    digest: str


class Lease(Message, frozen=True, kw_only=True):
    """A work item that one replica may work on until the lease runs out."""

    entry_id: str
    item: WorkItem
    deliveries: int
    """How often the item was handed out, this time included."""


class Attempt(Message, frozen=True, kw_only=True):
    """One time that work was handed out in vain."""

    replica: str
    at: float
    """When that was noticed, in seconds since 1970, by Redis' clock."""
    why: str


class DeadWork(Message, frozen=True, kw_only=True):
    """An entry that was set aside."""

    entry_id: str
    kind: Kind
    group_id: str
    reason: str
    cause: Literal["failed", "corrupt"]
    """`failed`: nobody could finish the work. `corrupt`: bytes were damaged; the group can be issued anew."""
    epoch: int
    """Trainer epoch in which it happened."""
    attempts: tuple[Attempt, ...] = ()
    """Who had held it, in order; none of a group that was damaged."""


class InFlight(Message, frozen=True, kw_only=True):
    """How many groups of one kind are where."""

    waiting: int
    """Issued, in nobody's hands."""
    leased: int
    """Being sampled or scored."""
    finished: int
    """Submitted and not yet in a committed checkpoint."""


@dataclass(frozen=True)
class Keys:
    """Names of one run's keys."""

    run: str

    def __call__(self, name: str) -> str:
        return f"retort:{{{self.run}}}:{name}"

    def work(self, kind: Kind) -> str:
        return self(f"work:{kind}")

    def groups(self, kind: Kind) -> str:
        return self(f"groups:{kind}")

    def of_functions(self) -> list[str]:
        """The keys that every function gets, in the order of `keyed` in functions.lua."""
        streams = [self.work(kind) for kind in KINDS] + [self.groups(kind) for kind in KINDS]
        return streams + [
            self(name)
            for name in (
                "dead",
                "state",
                "fence",
                "policy",
                "members",
                "evicted",
                "drain",
                "audit",
                "history",
                "progress",
                "stop",
            )
        ]

    def kind_of(self, stream: str) -> Kind:
        return "train" if stream.endswith(":train") else "validation"


class BadEntry(Exception):
    """A stream entry that cannot be used; `cause` as in DeadWork."""

    def __init__(self, cause: Literal["failed", "corrupt"], reason: str) -> None:
        super().__init__(reason)
        self.cause = cause
        self.reason = reason


@dataclass(frozen=True)
class Entry:
    """A stream entry as it lies in Redis."""

    entry_id: str
    group_id: str
    crc: str
    data: bytes

    def decode(self, message: type[M]) -> M:
        """The message inside. Raises BadEntry."""
        if self.crc != checksum(self.group_id, self.data):
            raise BadEntry("corrupt", f"entry {self.entry_id} does not match its checksum")
        try:
            return message.from_bytes(self.data)
        except msgspec.DecodeError as error:
            reason = f"entry {self.entry_id} is no {message.__name__} ({error}). Do all services have one version?"
            raise BadEntry("failed", reason) from error


def checksum(group_id: str, data: bytes) -> str:
    """CRC-32 over group id and message."""
    return str(zlib.crc32(data, zlib.crc32(group_id.encode())))


def _library() -> tuple[str, str]:
    body = files("retort.queues").joinpath("functions.lua").read_text(encoding="utf-8")
    # Named after its content: two versions of Retort on one server each call the code written for them.
    name = f"retort_{hashlib.blake2b(body.encode(), digest_size=6).hexdigest()}"
    return name, f"#!lua name={name}\nlocal LIBRARY = '{name}'\n{body}"


LIBRARY, LIBRARY_SOURCE = _library()


def function(name: str) -> str:
    """Full name of a function of the library."""
    return f"{LIBRARY}_{name}"
