import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from services.trainer.ranks import broadcast_bytes, gather_all


@pytest.mark.parametrize("data", [b"", b"\x00", b"a step" * 1000])
def test_bytes_arrive_as_they_were(mesh: DeviceMesh, data: bytes) -> None:
    assert mesh.size() == 1
    assert broadcast_bytes(data) == data


def test_gathered_tensors_are_stacked_by_rank(mesh: DeviceMesh) -> None:
    assert mesh.size() == 1
    assert gather_all(torch.tensor([1.0, 2.0]).expand(2, 2).T).tolist() == [[[1.0, 1.0], [2.0, 2.0]]]
