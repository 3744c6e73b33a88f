"""Attention on a CPU computes what one product with a mask computes, and tells the compiler its true shapes."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.trainer.cpu_attention import attend_on_cpu
from services.trainer.segments import NO_PREFIX, Segments

SCALING = 0.5
ALONE = [NO_PREFIX]
LAYOUTS = [
    ([1], ALONE),
    ([2, 2], 2 * ALONE),
    ([3, 9, 1, 4], 4 * ALONE),
    ([3, 2, 5], [*ALONE, 0, 0]),
    ([4, 1, 6, 2, 3, 1, 2], [*ALONE, 0, *ALONE, 2, 2, *ALONE, 5]),
]


def heads_of(lengths: Sequence[int], kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [
        torch.randn(1, count, sum(lengths), 4, generator=generator, dtype=torch.float64).requires_grad_()
        for count in (4, kv_heads, kv_heads)
    ]


def seen_by_each_token(lengths: Sequence[int], prefixes: Sequence[int]) -> Tensor:
    """[T, T] who sees whom, token by token."""
    segment = [number for number, length in enumerate(lengths) for _ in range(length)]
    tokens = range(len(segment))
    return torch.tensor(
        [[prefixes[segment[i]] == segment[j] or (segment[i] == segment[j] and j <= i) for j in tokens] for i in tokens]
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("lengths", "prefixes"), LAYOUTS)
def test_values_and_gradients_are_those_of_one_product_with_a_mask(
    lengths: list[int], prefixes: list[int], kv_heads: int
) -> None:
    heads = heads_of(lengths, kv_heads)
    segments = Segments.of(lengths, prefixes, torch.device("cpu"))
    out, _ = attend_on_cpu(*heads, segments.bounds, segments.prefixes, SCALING)
    mask = seen_by_each_token(lengths, prefixes)
    expected = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=SCALING, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weights = torch.arange(out.numel(), dtype=torch.float64).view_as(out)
    gradients = [torch.autograd.grad((result * weights).sum(), heads) for result in (out, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_in_bfloat16_it_is_the_same_up_to_rounding() -> None:
    exact = heads_of([3, 2, 5], 2)
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    segments = Segments.of([3, 2, 5], [NO_PREFIX, 0, 0], torch.device("cpu"))
    outputs = [attend_on_cpu(*heads, segments.bounds, segments.prefixes, SCALING)[0] for heads in (exact, rounded)]
    torch.testing.assert_close(outputs[1].double(), outputs[0], rtol=0, atol=0.03)
    gradients = [torch.autograd.grad(out.sum(), heads) for out, heads in zip(outputs, (exact, rounded), strict=True)]
    for expected, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_strides_and_gradients_are_as_the_compiler_is_told(transposed: bool) -> None:
    heads = heads_of([3, 2], 2)
    if transposed:  # as heads come from a model's projections
        heads = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in heads]
    segments = Segments.of([3, 2], [NO_PREFIX, 0], torch.device("cpu"))
    torch.library.opcheck(attend_on_cpu, (*heads, segments.bounds, segments.prefixes, SCALING))
