"""The teacher: an exponential moving average of the policy, float32, in shards of the policy's shape."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from services.trainer.policy import Policy
from services.trainer.schedule import update_teacher


class Teacher:
    """Holds the averaged weights and lends them to the policy's network for scoring."""

    def __init__(self, policy: Policy) -> None:
        self.shards: list[Tensor] = [shard.clone() for shard in policy.local_shards()]

    def follow(self, policy: Policy, *, rate: float, finite_updates: int) -> None:
        """Move towards the policy; once per training step."""
        update_teacher(self.shards, policy.local_shards(), rate=rate, finite_updates=finite_updates)

    @contextmanager
    def in_place_of(self, policy: Policy) -> Iterator[None]:
        """Within the block the policy's network has the teacher's weights."""
        self._exchange(policy)
        try:
            yield
        finally:
            self._exchange(policy)

    @torch.no_grad()
    def _exchange(self, policy: Policy) -> None:
        for mine, other in zip(self.shards, policy.local_shards(), strict=True):
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)
