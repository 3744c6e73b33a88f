"""What adapters add up to, and that another base than the trainer's is seen."""

import pytest
import torch
from torch import Tensor

from retort.lora import MergedWeights, base_digest, merge
from retort.weight_sync import LoraBase, TensorSpec

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
SPECS = [TensorSpec(name=Q, shape=[2, 2], dtype="float32"), TensorSpec(name=NORM, shape=[3], dtype="float32")]
BASE = {Q: torch.tensor([[1.0, 2.0], [3.0, 4.0]]), NORM: torch.tensor([5.0, 6.0, 7.0])}


def factors(a: list[float], b: list[float]) -> dict[str, Tensor]:
    """Of rank 1."""
    layer = Q.removesuffix("weight")
    return {f"{layer}lora_A.weight": torch.tensor([a]), f"{layer}lora_B.weight": torch.tensor(b)[:, None]}


def merged(base: dict[str, Tensor], adapters: dict[str, Tensor], scale: float = 2.0) -> tuple[dict[str, Tensor], int]:
    announced = LoraBase(tensors=SPECS, scale=scale)
    weights = MergedWeights(announced, base.items(), adapters, torch.device("cpu"))
    return dict(weights), weights.base_digest


def test_a_layer_is_its_base_plus_the_scaled_product_and_the_rest_is_its_base() -> None:
    weights, _ = merged(BASE, factors([1.0, -1.0], [10.0, 0.5]))
    assert list(weights) == [Q, NORM]
    assert weights[Q].tolist() == [[1 + 2 * 10, 2 - 2 * 10], [3 + 2 * 0.5, 4 - 2 * 0.5]]
    assert weights[NORM].tolist() == [5.0, 6.0, 7.0]


def test_nothing_adds_up_from_one_version_to_the_next() -> None:
    merged(BASE, factors([1.0, 1.0], [1.0, 1.0]))
    weights, _ = merged(BASE, factors([1.0, 1.0], [0.0, 0.0]))
    assert torch.equal(weights[Q], BASE[Q])


def test_the_sum_is_rounded_once() -> None:
    """bfloat16 has steps of 1/128 above 1. Half a step alone would be rounded away, and two of them are a step."""
    half = torch.full((2, 1), 1 / 256).bfloat16()
    assert merge(torch.ones(1, 1).bfloat16(), half, torch.ones(1, 2).bfloat16(), 1.0).item() == 1 + 1 / 128


def test_the_digest_does_not_depend_on_the_order_in_which_files_are_read() -> None:
    _, digest = merged(dict(reversed(BASE.items())), {})
    assert digest == base_digest(SPECS, BASE)


def test_what_was_not_announced_is_left_out() -> None:
    weights, digest = merged({"lm_head.weight": torch.ones(2), **BASE}, {})
    assert list(weights) == [Q, NORM]
    assert digest == base_digest(SPECS, BASE)


def one_bit_off() -> dict[str, Tensor]:
    other = {name: tensor.clone() for name, tensor in BASE.items()}
    other[NORM].view(torch.int32)[2] ^= 1
    return other


@pytest.mark.parametrize(
    "other",
    [
        one_bit_off(),
        {Q: BASE[Q].T, NORM: BASE[NORM]},
        {Q: BASE[Q].flatten(), NORM: BASE[NORM]},
        {NORM: BASE[NORM]},
        {},
    ],
    ids=["one bit", "transposed", "another shape", "a tensor missing", "nothing"],
)
def test_another_base_has_another_digest(other: dict[str, Tensor]) -> None:
    assert merged(other, {})[1] != base_digest(SPECS, BASE)


def test_a_base_on_disk_in_a_wider_type_is_that_of_the_type_that_is_served() -> None:
    wide = {name: tensor.double() for name, tensor in BASE.items()}
    weights, digest = merged(wide, {})
    assert digest == base_digest(SPECS, BASE)
    assert weights[Q].dtype == torch.float32
