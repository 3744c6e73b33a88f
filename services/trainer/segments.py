"""Where the sequences of a micro-batch lie, and what each token sees.

A prompt that several completions share is there once. Its tokens see none of the completions, so what a model computes
for them is the same for all.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

NO_PREFIX = -1


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
