"""Attention over packed sequences, plugged into transformers so that the model code stays the library's.

Sequences of a micro-batch lie one after the other in a row without padding. Everything in the model works per token;
only attention has to know what a token sees: `Segments`. On CUDA one kernel takes them all, and in float32 each has a
call of its own. So has each on a CPU, by other means (`cpu_attention`). Nothing is computed for padding: laid side by
side, sequences would cost the square of the longest each.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from services.trainer.cpu_attention import attend_on_cpu
from services.trainer.segments import Segments, take

PACKED_ATTENTION = "retort_packed"
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
"""What the kernel for sequences of different lengths takes."""
CAUSAL_WINDOW = (-1, 0)
"""Everything before a token, and nothing after it. Queries are the last of the keys, as in `causal_lower_right`."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment, and over all of its prefix.

    query [1, heads, T, d], key and value [1, kv_heads, T, d] -> [1, T, heads, d]
    """
    assert attention_mask is None
    if query.device.type == "cpu":
        out, _denominators = attend_on_cpu(query, key, value, segments.bounds, segments.prefixes, scaling)
        return out.transpose(1, 2), None
    attend = attend_at_once if query.dtype in KERNEL_DTYPES else attend_one_by_one
    return attend(query, key, value, segments, scaling), None


def attend_at_once(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
    """From torch's kernel for sequences of different lengths (flash attention)."""
    # Not every torch that may run this lets a key/value head serve several query heads here; so each gets its copy.
    copies = query.shape[1] // key.shape[1]
    out = varlen_attn(
        query[0].transpose(0, 1),
        take(key, segments.seen, 2)[0].transpose(0, 1).repeat_interleave(copies, 1),
        take(value, segments.seen, 2)[0].transpose(0, 1).repeat_interleave(copies, 1),
        segments.bounds,
        segments.seen_bounds,
        segments.longest,
        segments.longest_seen,
        scale=scaling,
        window_size=CAUSAL_WINDOW,
    )
    assert isinstance(out, Tensor)
    return out[None]


def attend_one_by_one(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
    """From a call for each segment, with every type and on every device."""
    sizes, seen = segments.bounds.diff().tolist(), segments.seen_bounds.diff().tolist()
    keys, values = (take(tensor, segments.seen, 2).split(seen, 2) for tensor in (key, value))
    out = [
        F.scaled_dot_product_attention(
            *qkv, attn_mask=causal_lower_right(qkv[0].shape[2], qkv[1].shape[2]), scale=scaling, enable_gqa=True
        )
        for qkv in zip(query.split(sizes, 2), keys, values, strict=True)
    ]
    return torch.cat(out, 2).transpose(1, 2)


def _no_mask(*_: Any, **__: Any) -> None:
    """What a token sees is in its segment."""


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
