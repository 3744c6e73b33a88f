"""The queue between trainer and rollout service: one Redis or Valkey, which both may lose and find again.

Keys, all prefixed `retort:{<run>}:` (the braces keep them in one cluster slot):

    work:train, work:validation       streams of WorkItem; the consumer group "rollout" leases their entries
    groups:train, groups:validation   streams of RolloutGroup, in the order in which they were finished
    state       hash  group_id -> "issued <id of its work entry>" | "submitted"; what is not in it, nobody awaits
    dead        stream of entries that were set aside, each with cause, reason and the history of its deliveries
    history     hash  stream and entry id -> the deliveries of unfinished work that failed: by whom, when, why
    fence       string, the highest trainer epoch seen; it never falls
    policy      hash  epoch, version, digest of the committed policy
    members     hash  replica name -> Member
    evicted     hash  replica name -> incarnation that was struck off
    drain       hash  replica name -> incarnation that is asked to finish its work and leave
    audit       stream of the trainer calls that were accepted, epoch and name; about the last 10,000
    progress    hash  what the trainer is doing
    stop        string, why the run should end

A group, from the point of view of `state`:

                  issue                  submit                     commit
       (absent) ────────► "issued" ────────────────► "submitted" ────────────► (absent)
          ▲                  │ bury                       │ quarantine
          └──────────────────┴────────────────────────────┘        both also write `dead`

A work entry:  waiting ─take─► leased ─submit─► gone
                  ▲               │ not renewed for lease_s, or given back
                  └───────────────┘      (after max_deliveries such deliveries it is buried instead)

Only the functions in functions.lua write these keys, except that an operator may delete from `dead` and `stop`. Each is
atomic and idempotent by group id or entry id, so every call may be repeated when its reply was lost.
At the server's memory limit those that bring more work are refused (RedisFull); all others go on, which empties it.
Trainer calls carry the epoch of their trainer; one that is not the newest gets `Fenced` and has changed nothing.
The trainer reads groups from a cursor of its own, after a restart from the beginning; groups leave only in `commit`.
What Redis forgets is therefore redone, never lost: a waiting trainer issues again whatever it still awaits.
"""

from retort.queues.connection import IMPATIENT, connect, connect_async, load_library
from retort.queues.protocol import (
    KINDS,
    Attempt,
    DeadWork,
    Evicted,
    Fenced,
    InFlight,
    Kind,
    Lease,
    Member,
    Policy,
    RedisFull,
)
from retort.queues.rollout import RolloutQueue
from retort.queues.trainer import TrainerQueue
from retort.queues.view import (
    PendingLease,
    RunView,
    clear_stop,
    drop_dead,
    evict,
    replay_dead,
    request_drain,
    request_stop,
)

__all__ = [
    "IMPATIENT",
    "KINDS",
    "Attempt",
    "DeadWork",
    "Evicted",
    "Fenced",
    "InFlight",
    "Kind",
    "Lease",
    "Member",
    "PendingLease",
    "Policy",
    "RedisFull",
    "RolloutQueue",
    "RunView",
    "TrainerQueue",
    "clear_stop",
    "connect",
    "connect_async",
    "drop_dead",
    "evict",
    "load_library",
    "replay_dead",
    "request_drain",
    "request_stop",
]
