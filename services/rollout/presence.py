"""How a replica shows itself to the others: its entry in the members of the run."""

import asyncio
import math
import os
import socket
import time
import uuid
from dataclasses import dataclass, field
from typing import Literal

from retort.queues import Member, RolloutQueue
from services.rollout import metrics
from services.rollout.sampler import Sampler

ANNOUNCE_EVERY_S = 1.0
LONG_SCORING_S = 2.0
"""Scores that take longer are what the replica waits for."""


@dataclass
class Presence:
    """Writes the replica's `Member` entry, from the moment the process starts."""

    name: str
    queue: RolloutQueue
    http_url: str
    control_url: str
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)

    async def loading(self) -> None:
        """Say that the engine is being loaded."""
        await self._announce("loading")

    async def follow(self, sampler: Sampler, draining: asyncio.Event) -> None:
        """For ever: say what the replica does, and set `draining` when the operator asks for it.

        Raises Evicted when the trainer went on without it.
        """
        receiver = sampler.receiver
        while True:
            # Who is in an update has to come to its end, or its groups never would: the trainer leaves out who drains.
            state = "draining" if draining.is_set() and receiver.state == "serving" else receiver.state
            if await self._announce(state, sampler) == "drain":
                draining.set()
            metrics.POLICY_VERSION.set(-1 if receiver.served_version is None else receiver.served_version)
            metrics.GROUPS_IN_HAND.set(len(sampler.in_hand))
            await receiver.wait_for_change(ANNOUNCE_EVERY_S)

    async def _announce(self, state: str, sampler: Sampler | None = None) -> Literal["ok", "drain"]:
        waiting = {"joining": "the trainer's first weights", "updating": "the trainer's weights"}
        member = Member(
            name=self.name,
            pid=os.getpid(),
            host=socket.gethostname(),
            control_url=self.control_url,
            http_url=self.http_url,
            policy_version=sampler.receiver.served_version if sampler else None,
            state=state,  # type: ignore[arg-type]  # one of the receiver's three, loading or draining
            incarnation=self.incarnation,
            groups_in_hand=len(sampler.in_hand) if sampler else 0,
            groups_finished=sampler.groups_finished if sampler else 0,
            tokens_generated=sampler.tokens_generated if sampler else 0,
            last_finished=sampler.last_finished if sampler else 0.0,
            waiting_for=waiting.get(state, _long_scoring(sampler)),
            updated=time.time(),
        )
        return await self.queue.announce(member)


def _long_scoring(sampler: Sampler | None) -> str:
    since = min(sampler.scoring_since.values(), default=math.inf) if sampler else math.inf
    return "the reward service" if time.monotonic() - since > LONG_SCORING_S else ""
