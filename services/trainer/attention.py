"""Attention over packed sequences, plugged into transformers so that the model code stays the library's.

Sequences of a micro-batch lie one after the other in a row without padding. Everything in the model works per token;
only attention has to know where one sequence ends. Here it lays them side by side, padded on the right, for
scaled_dot_product_attention: under a causal mask padding on the right changes no real token, so no mask is needed.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

PACKED_ATTENTION = "retort_packed"


@dataclass(frozen=True)
class Layout:
    """Where the tokens of S packed sequences, at most L long and T in all, stand when laid side by side."""

    padded: Tensor
    """[S, L] index into the packed row; past the end of a sequence any valid index."""
    packed: Tensor
    """[T] index into the flattened [S * L]; inverse of `padded` on real tokens."""

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> "Layout":
        sizes = torch.tensor(lengths, device=device)
        longest = max(lengths)
        starts = sizes.cumsum(0) - sizes
        column = torch.arange(longest, device=device)
        padded = starts[:, None] + torch.minimum(column[None, :], sizes[:, None] - 1)
        packed = (column[None, :] < sizes[:, None]).flatten().nonzero()[:, 0]
        return cls(padded, packed)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence.

    query [1, heads, T, d], key and value [1, kv_heads, T, d] -> [1, T, heads, d]
    """
    assert attention_mask is None
    query, key, value = (one[0][:, layout.padded].transpose(0, 1) for one in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)[layout.packed][None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """Where sequences end is in the layout."""


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
