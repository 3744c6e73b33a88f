"""What rank 0 knows reaches the others, and what each knows reaches all."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from services.trainer.ranks import broadcast_bytes, gather_all
from tests.integration.trainer_ranks import Ranks


def hear(data: bytes) -> bytes:
    return broadcast_bytes(data if dist.get_rank() == 0 else b"ignored, and of another length")


def tell() -> list[list[float]]:
    return gather_all(torch.tensor([float(dist.get_rank()), 0.5])).tolist()


@pytest.mark.parametrize("data", [b"", b"\x00", b"a step" * 1000])
def test_all_ranks_hear_what_rank_0_says(ranks: Callable[[int], Ranks], data: bytes) -> None:
    assert ranks(3).run(hear, data) == [data] * 3


def test_all_ranks_hear_what_each_says(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(3).run(tell) == [[[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]]] * 3
