"""Where the sequences of a micro-batch lie, and what each token sees.

A prompt that several completions share is there once. Its tokens see none of the completions, so what a model computes
for them is the same for all.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

NO_PREFIX = -1


@torch.library.custom_op("retort::take", mutates_args=())
def take(tensor: Tensor, positions: Tensor, dim: int) -> Tensor:
    """`tensor` at positions along a dimension, any number of times each. Gradients are summed up in float32 at least.

    PyTorch's own indexing would round after every addition to a position, and compiled for a GPU in no fixed order.
    """
    return tensor.index_select(dim, positions)


@torch.library.custom_op("retort::put_back", mutates_args=())
def _put_back(grad: Tensor, positions: Tensor, dim: int, size: int) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad = grad.movedim(dim, 0)
    # Unlike `index_add_`, in the same order every time.
    total = grad.new_zeros(size, *grad.shape[1:], dtype=wide).index_put_((positions,), grad.to(wide), accumulate=True)
    return total.to(grad.dtype).movedim(0, dim).contiguous()


@take.register_fake
def _taken(tensor: Tensor, positions: Tensor, dim: int) -> Tensor:
    return tensor.new_empty([*tensor.shape[:dim], positions.shape[0], *tensor.shape[dim + 1 :]])


@_put_back.register_fake
def _whole(grad: Tensor, positions: Tensor, dim: int, size: int) -> Tensor:
    return grad.new_empty([*grad.shape[:dim], size, *grad.shape[dim + 1 :]])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    tensor, positions, ctx.dim = inputs
    ctx.size = tensor.shape[ctx.dim]
    ctx.save_for_backward(positions)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _put_back(grad, *ctx.saved_tensors, ctx.dim, ctx.size), None, None


take.register_autograd(_backward, setup_context=_keep)


class Segments(NamedTuple):
    """S stretches of T tokens, one after the other. A token sees what is before it in its own segment, and all of the
    segment that this one continues: its prefix, which continues none itself."""

    bounds: Tensor
    """[S + 1] int32: where each begins, and T."""
    prefixes: Tensor
    """[S + 1] int32: the number of each one's prefix, or `NO_PREFIX`, as for T. (A compiled block has code of its own
    for a tensor of a single element.)"""
    seen: Tensor
    """[K] position of what each segment sees: its prefix and then itself; segment after segment."""
    seen_bounds: Tensor
    """[S + 1] int32: where that begins for each segment, and K."""
    longest: int
    """Most tokens of a segment."""
    longest_seen: int
    """Most tokens that a segment sees."""

    @classmethod
    def of(cls, lengths: Sequence[int], prefixes: Sequence[int], device: torch.device) -> "Segments":
        bounds = [0, *accumulate(lengths)]
        own = [torch.arange(start, end) for start, end in pairwise(bounds)]
        seen = [
            one if prefix == NO_PREFIX else torch.cat([own[prefix], one])
            for one, prefix in zip(own, prefixes, strict=True)
        ]
        seen_lengths = [len(one) for one in seen]
        return cls(
            bounds=torch.tensor(bounds, dtype=torch.int32, device=device),
            prefixes=torch.tensor([*prefixes, NO_PREFIX], dtype=torch.int32, device=device),
            seen=torch.cat(seen).to(device),
            seen_bounds=torch.tensor([0, *accumulate(seen_lengths)], dtype=torch.int32, device=device),
            longest=max(lengths),
            longest_seen=max(seen_lengths),
        )
