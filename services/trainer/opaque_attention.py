"""Attention of one sequence after the other on a CPU, as an operation that `torch.compile` does not look into.

Traced, the loop would be compiled anew for every combination of lengths. Left out of the graph it would break it, and
a block whose activations are computed again is not compiled at all then.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""What `scaled_dot_product_attention` calls on a CPU, with every type."""


@torch.library.custom_op("retort::attend_one_by_one", mutates_args=(), device_types="cpu")
def attend_opaquely(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Causal, within each sequence.

    query, key and value [1, heads, T, d], bounds [S + 1] -> [1, heads, T, d], and for the backward pass the logarithm
    of every softmax's denominator [1, heads, T]
    """
    results = [FLASH(*qkv, 0.0, True, scale=scaling) for qkv in _sequences(bounds, query, key, value)]
    return _joined(out for out, _ in results), _joined(logarithms for _, logarithms in results)


@torch.library.custom_op("retort::attend_one_by_one_backward", mutates_args=(), device_types="cpu")
def _backward_opaquely(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logarithms: Tensor,
    bounds: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    sequences = _sequences(bounds, grad, query, key, value, out, logarithms)
    of_query, of_key, of_value = zip(
        *(FLASH_BACKWARD(*tensors, 0.0, True, scale=scaling) for tensors in sequences), strict=True
    )
    return _joined(of_query), _joined(of_key), _joined(of_value)


@attend_opaquely.register_fake
def _shapes(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=wide)


@_backward_opaquely.register_fake
def _backward_shapes(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, bounds, out, logarithms = ctx.saved_tensors
    return *_backward_opaquely(grad, query, key, value, out, logarithms, bounds, ctx.scaling), None, None


attend_opaquely.register_autograd(_backward, setup_context=_keep)


def _sequences(bounds: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    sizes = bounds.diff().tolist()
    return zip(*(tensor.split(sizes, 2) for tensor in tensors), strict=True)


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts), 2).contiguous()
