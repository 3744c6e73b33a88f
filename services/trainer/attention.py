"""Attention over packed sequences, plugged into transformers so that the model code stays the library's.

Sequences of a micro-batch lie one after the other in a row without padding. Everything in the model works per token;
only attention has to know where one sequence ends. It is called once for each, so that nothing is computed for padding:
laid side by side, sequences would cost the square of the longest each.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

PACKED_ATTENTION = "retort_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: Sequence[int],
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence; the lengths add up to T.

    query [1, heads, T, d], key and value [1, kv_heads, T, d] -> [1, T, heads, d]
    """
    assert attention_mask is None
    sizes = list(sequence_lengths)
    sequences = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    out = [F.scaled_dot_product_attention(*qkv, is_causal=True, scale=scaling, enable_gqa=True) for qkv in sequences]
    return torch.cat(out, 2).transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Where sequences end is in their lengths."""


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
