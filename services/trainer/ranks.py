"""What rank 0 knows and the others have to: bytes, broadcast over gloo on the CPU whatever the tensors travel on."""

import torch
import torch.distributed as dist
from torch import Tensor


def broadcast_bytes(data: bytes) -> bytes:
    """Rank 0's `data` on every rank; what the others pass is ignored."""
    size = torch.tensor([len(data)])
    dist.broadcast(size, src=0)
    rank = dist.get_rank()
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data and rank == 0 else None
    if buffer is None:
        buffer = torch.empty(int(size), dtype=torch.uint8)
    if len(buffer):
        dist.broadcast(buffer, src=0)
    return buffer.numpy().tobytes()


def gather_all(tensor: Tensor) -> Tensor:
    """The same-shaped CPU tensors of all ranks, stacked: [ranks, ...]."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)
