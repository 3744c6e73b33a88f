"""What compiled blocks call for attention computes what eager ones do, and tells the compiler its true shapes."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.trainer.opaque_attention import attend_opaquely

SCALING = 0.5


def heads_and_bounds(lengths: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    shape = (1, 2, sum(lengths), 4)
    heads = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    return heads, torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("lengths", [[1], [2, 2], [3, 9, 1, 4]])
def test_values_and_gradients_are_those_of_each_sequence_by_itself(lengths: list[int]) -> None:
    heads, bounds = heads_and_bounds(lengths)
    out, _ = attend_opaquely(*heads, bounds, SCALING)
    parts = zip(*(tensor.split(lengths, 2) for tensor in heads), strict=True)
    expected = torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, scale=SCALING) for part in parts], 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weights = torch.arange(out.numel(), dtype=torch.float64).view_as(out)
    gradients = [torch.autograd.grad((result * weights).sum(), heads) for result in (out, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_strides_and_gradients_are_as_the_compiler_is_told(transposed: bool) -> None:
    heads, bounds = heads_and_bounds([3, 2])
    if transposed:  # as heads come from a model's projections
        heads = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in heads]
    torch.library.opcheck(attend_opaquely, (*heads, bounds, SCALING))
