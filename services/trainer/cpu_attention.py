"""Attention over the segments of a micro-batch on a CPU, one after the other, so that nothing is computed for padding.

What all completions of a prompt see of it is one product. It is joined to what each sees of itself as the parts of a
sequence are joined inside of flash attention (Dao et al. 2022, arXiv:2205.14135, section 3.1): softmaxes over parts, by
their denominators. The backward pass of a part needs only the joint result and denominator.

It is an operation that `torch.compile` does not look into. Traced, the loop would be compiled anew for every
combination of lengths. Left out of the graph it would break it, and a block whose activations are computed again is not
compiled at all then.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from services.trainer.segments import NO_PREFIX

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""What `scaled_dot_product_attention` calls on a CPU, with every type."""


@torch.library.custom_op("retort::attend_on_cpu", mutates_args=(), device_types="cpu")
def attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, prefixes: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Causal within each segment, and over all of its prefix. See `Segments` for bounds and prefixes.

    query [1, heads, T, d], key and value [1, kv_heads, T, d] -> [1, heads, T, d], and for the backward pass the
    logarithm of every softmax's denominator [1, heads, T]
    """
    out, denominators = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=_wide(query))
    for own in _segments(bounds):
        results = FLASH(*_at(own, query, key, value), 0.0, True, scale=scaling)
        out[:, :, own], denominators[:, :, own] = results
    for prefix, continuing in _continued(bounds, prefixes):
        of_prefix, of_prefix_denominators = FLASH(query[:, :, continuing], *_at(prefix, key, value), 0.0, scale=scaling)
        joint = torch.logaddexp(denominators[:, :, continuing], of_prefix_denominators)
        share = (of_prefix_denominators - joint).exp_()[..., None]
        out[:, :, continuing] = out[:, :, continuing].to(share.dtype).lerp_(of_prefix.to(share.dtype), share)
        denominators[:, :, continuing] = joint
    return out, denominators


@torch.library.custom_op("retort::attend_on_cpu_backward", mutates_args=(), device_types="cpu")
def _backward_on_cpu(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    denominators: Tensor,
    bounds: Tensor,
    prefixes: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key, of_value = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    for own in _segments(bounds):
        tensors = _at(own, grad, query, key, value, out, denominators)
        of_query[:, :, own], of_key[:, :, own], of_value[:, :, own] = FLASH_BACKWARD(*tensors, 0.0, True, scale=scaling)
    for prefix, continuing in _continued(bounds, prefixes):
        grad_continuing, query_continuing, *results = _at(continuing, grad, query, out, denominators)
        of_prefix = _at(prefix, key, value)
        more = FLASH_BACKWARD(grad_continuing, query_continuing, *of_prefix, *results, 0.0, False, scale=scaling)
        of_query[:, :, continuing] += more[0]
        of_key[:, :, prefix] += more[1]
        of_value[:, :, prefix] += more[2]
    return of_query, of_key, of_value


@attend_on_cpu.register_fake
def _shapes(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=_wide(query))


@_backward_on_cpu.register_fake
def _backward_shapes(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, bounds, prefixes, out, denominators = ctx.saved_tensors
    gradients = _backward_on_cpu(grad, query, key, value, out, denominators, bounds, prefixes, ctx.scaling)
    return *gradients, None, None, None


attend_on_cpu.register_autograd(_backward, setup_context=_keep)


def _segments(bounds: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(bounds.tolist())]


def _continued(bounds: Tensor, prefixes: Tensor) -> Iterator[tuple[slice, slice]]:
    """(a prefix, segments that continue it and lie side by side: all of them, as they are packed)"""
    segments = _segments(bounds)
    for prefix, run in groupby(range(len(segments)), prefixes.tolist().__getitem__):
        if prefix != NO_PREFIX:
            first, *rest = run
            last = rest[-1] if rest else first
            yield segments[prefix], slice(segments[first].start, segments[last].stop)


def _at(where: slice, *tensors: Tensor) -> list[Tensor]:
    return [tensor[:, :, where] for tensor in tensors]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
