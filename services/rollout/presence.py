"""How a replica shows itself to the others: its entry in the members of the run."""

import math
import os
import socket
import time
import uuid
from dataclasses import dataclass, field

from retort.queues import Member, RolloutQueue
from services.rollout import metrics
from services.rollout.sampler import Sampler
from services.rollout.weight_receiver import WeightReceiver

ANNOUNCE_EVERY_S = 0.5
LONG_SCORING_S = 2.0
"""Scores that take longer are what the replica waits for."""


@dataclass
class Presence:
    """Writes the replica's `Member` entry, from the moment the process starts."""

    name: str
    url: str
    queue: RolloutQueue
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)

    async def loading(self) -> None:
        """Say that the engine is being loaded."""
        await self.queue.announce(self._member(state="loading", policy_version=None, groups=0, tokens=0))

    async def follow(self, receiver: WeightReceiver, sampler: Sampler) -> None:
        """For ever: say what the replica does. Raises Evicted when the trainer went on without it."""
        while True:
            await self.queue.announce(
                self._member(
                    state=receiver.state,
                    policy_version=receiver.served_version,
                    groups=len(sampler.in_hand),
                    tokens=sampler.tokens_generated,
                    scoring_s=time.monotonic() - min(sampler.scoring_since.values(), default=math.inf),
                )
            )
            metrics.POLICY_VERSION.set(-1 if receiver.served_version is None else receiver.served_version)
            metrics.GROUPS_IN_HAND.set(len(sampler.in_hand))
            await receiver.wait_for_change(ANNOUNCE_EVERY_S)

    def _member(
        self, *, state: str, policy_version: int | None, groups: int, tokens: int, scoring_s: float = 0.0
    ) -> Member:
        waiting = {"joining": "the trainer's first weights", "updating": "the trainer's weights"}
        return Member(
            name=self.name,
            pid=os.getpid(),
            host=socket.gethostname(),
            control_url=self.url,
            http_url=self.url,
            policy_version=policy_version,
            state=state,  # type: ignore[arg-type]  # one of the receiver's three, or loading
            incarnation=self.incarnation,
            groups_in_hand=groups,
            tokens_generated=tokens,
            waiting_for=waiting.get(state, "the reward service" if scoring_s > LONG_SCORING_S else ""),
            updated=time.time(),
        )
