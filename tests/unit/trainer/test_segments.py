import pytest
import torch

from services.trainer.segments import NO_PREFIX, Segments, take


def test_a_segment_sees_its_prefix_and_then_itself() -> None:
    segments = Segments.of([2, 1, 3, 1], [NO_PREFIX, 0, 0, NO_PREFIX], torch.device("cpu"))
    assert segments.bounds.tolist() == [0, 2, 3, 6, 7]
    assert segments.seen.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert segments.seen_bounds.tolist() == [0, 2, 5, 10, 11]
    assert (segments.longest, segments.longest_seen) == (3, 5)


def test_gradients_of_what_is_taken_often_are_rounded_once() -> None:
    tensor = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    # In bfloat16 256 + 1 is 256, and so is every sum after it.
    gradients = torch.cat([torch.full((1, 2), 256.0), torch.ones(64, 2)]).bfloat16()
    take(tensor, torch.zeros(65, dtype=torch.long), 0).backward(gradients)
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [[320.0, 320.0]]


@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_strides_and_gradients_are_as_the_compiler_is_told(transposed: bool) -> None:
    tensor = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    if transposed:
        tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(take, (tensor.requires_grad_(), torch.tensor([0, 3, 3]), 2))
