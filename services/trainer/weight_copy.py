"""Weights beside the policy's own, in float32 shards of the same shape, for its network to score with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class WeightCopy:
    """Begins as the policy's weights, of which `shards` are this rank's part."""

    def __init__(self, shards: list[Tensor], *, on_host: bool = False) -> None:
        """`on_host`: keep the copy in the host's memory, pinned if the weights lie on a GPU."""
        self.shards = [_on_host(shard) if on_host else shard.clone() for shard in shards]

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
            kept = other.clone()
            other.copy_(mine)
            mine.copy_(kept)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _on_host(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
