"""Moments on the host make the same updates as moments on the device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from services.trainer.host_memory import HostAdamW
from services.trainer.teacher import Teacher
from services.trainer.weight_copy import WeightCopy

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="memory apart from the host's: a GPU's")
    ),
]
ADAM = {"lr": 0.1, "weight_decay": 0.1, "fused": True}


def parameters(device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in ((5, 3), (7,), (0, 4))]


def gradients(device: str) -> Iterator[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield [torch.randn(parameter.shape, generator=generator).to(device) for parameter in parameters("cpu")]


def trained(optimizer_class: type[torch.optim.AdamW], device: str, **changes: Any) -> tuple[Any, list[nn.Parameter]]:
    """After three updates; the rate changes on the way."""
    weights = parameters(device)
    optimizer = optimizer_class(weights, **{**ADAM, **changes})
    for update, of_update in enumerate(gradients(device)):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + update)
        for weight, gradient in zip(weights, of_update, strict=True):
            weight.grad = gradient
        optimizer.step()
    return optimizer, weights


@pytest.mark.parametrize("device", DEVICES)
def test_three_updates_have_the_bits_of_the_librarys_adam(device: str) -> None:
    (plain, expected), (hosted, weights) = trained(torch.optim.AdamW, device), trained(HostAdamW, device)
    for ours, theirs in zip(weights, expected, strict=True):
        assert torch.equal(ours, theirs)
        for name, value in plain.state[theirs].items():
            assert torch.equal(hosted.state[ours][name].cpu(), value.cpu()), name


@pytest.mark.parametrize("device", DEVICES)
def test_between_updates_moments_lie_on_the_host(device: str) -> None:
    optimizer, weights = trained(HostAdamW, device)
    for weight in weights:
        for name in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[weight][name]
            assert moment.device.type == "cpu"
            assert moment.is_pinned() is (device == "cuda" and moment.numel() > 0)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    weights = parameters("cpu")
    optimizer = HostAdamW(weights, **ADAM)
    weights[1].grad = torch.ones(7)
    optimizer.step()
    assert torch.equal(weights[0], parameters("cpu")[0])
    assert not optimizer.state[weights[0]]


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_on_the_host_changes_places_with_the_weights_and_back(device: str) -> None:
    weights = [torch.tensor([1.0, 2.0], device=device), torch.tensor([3.0], device=device)]
    copy = WeightCopy(weights, on_host=True)
    for weight in weights:
        weight.add_(10)
    with copy.in_place_of(weights):
        assert [weight.tolist() for weight in weights] == [[1.0, 2.0], [3.0]]
        assert [shard.tolist() for shard in copy.shards] == [[11.0, 12.0], [13.0]]
    assert [weight.tolist() for weight in weights] == [[11.0, 12.0], [13.0]]
    assert [(shard.tolist(), shard.device.type) for shard in copy.shards] == [([1.0, 2.0], "cpu"), ([3.0], "cpu")]


@pytest.mark.parametrize("device", DEVICES)
def test_a_teacher_on_the_host_follows_with_the_bits_of_one_on_the_device(device: str) -> None:
    class OfShards:
        def local_shards(self) -> list[torch.Tensor]:
            return [parameter.detach() for parameter in weights]

    weights = parameters(device)
    policy: Any = OfShards()
    teachers = [Teacher(policy, on_host=on_host) for on_host in (False, True)]
    for weight in weights:
        weight.data.mul_(1.7)
    for teacher in teachers:
        teacher.follow(policy, rate=0.05, finite_updates=1)
    for plain, hosted in zip(teachers[0].shards, teachers[1].shards, strict=True):
        assert torch.equal(plain.cpu(), hosted)
