"""Weights beside the policy's own, in float32 shards of the same shape, for its network to score with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightCopy:
    """Begins as the policy's weights, of which `shards` are this rank's part."""

    def __init__(self, shards: list[Tensor]) -> None:
        self.shards = [shard.clone() for shard in shards]

    def take(self, shards: list[Tensor]) -> None:
        """Become the given weights."""
        for mine, other in zip(self.shards, shards, strict=True):
            mine.copy_(other)

    @contextmanager
    def in_place_of(self, shards: list[Tensor]) -> Iterator[None]:
        """Within the block the two have changed places."""
        self._exchange(shards)
        try:
            yield
        finally:
            self._exchange(shards)

    @torch.no_grad()
    def _exchange(self, shards: list[Tensor]) -> None:
        for mine, other in zip(self.shards, shards, strict=True):
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)
