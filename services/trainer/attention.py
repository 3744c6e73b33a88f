"""Attention over packed sequences, plugged into transformers so that the model code stays the library's.

Sequences of a micro-batch lie one after the other in a row without padding. Everything in the model works per token;
only attention has to know where one sequence ends. On CUDA one kernel takes them all. Elsewhere, and in float32, it is
called once for each, so that nothing is computed for padding: laid side by side, sequences would cost the square of
the longest each.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from services.trainer.opaque_attention import attend_opaquely

PACKED_ATTENTION = "retort_packed"
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
"""What the kernel for sequences of different lengths takes."""
CAUSAL_WINDOW = (-1, 0)
"""Everything before a token, and nothing after it."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_bounds: Tensor,
    longest_sequence: int,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence, of which the longest has so many tokens.

    query [1, heads, T, d], key and value [1, kv_heads, T, d], sequence_bounds [S + 1] -> [1, T, heads, d]
    """
    assert attention_mask is None
    if query.is_cuda and query.dtype in KERNEL_DTYPES:
        return attend_at_once(query, key, value, sequence_bounds, longest_sequence, scaling), None
    if torch.compiler.is_compiling():
        copies = query.shape[1] // key.shape[1]
        heads = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
        return attend_opaquely(query, *heads, sequence_bounds, scaling)[0].transpose(1, 2), None
    sizes = sequence_bounds.diff().tolist()
    sequences = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    out = [F.scaled_dot_product_attention(*qkv, is_causal=True, scale=scaling, enable_gqa=True) for qkv in sequences]
    return torch.cat(out, 2).transpose(1, 2), None


def attend_at_once(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float) -> Tensor:
    """The same from torch's kernel for sequences of different lengths (flash attention)."""
    # Not every torch that may run this lets a key/value head serve several query heads here; so each gets its copy.
    copies = query.shape[1] // key.shape[1]
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).repeat_interleave(copies, 1),
        value[0].transpose(0, 1).repeat_interleave(copies, 1),
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=CAUSAL_WINDOW,
    )
    assert isinstance(out, Tensor)
    return out[None]


def _no_mask(*_: Any, **__: Any) -> None:
    """Where sequences end is in their lengths."""


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
