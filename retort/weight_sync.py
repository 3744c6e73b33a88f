"""How new weights travel from the trainer to every rollout replica: one bucketed broadcast, with digests.

The trainer takes a `Snapshot` (parameters in the served dtype, packed into byte buckets), opens a process group
with the replicas that answered `PrepareRequest`, and broadcasts the buckets. The group goes on while its members are
the same and nothing fails. Backend gloo on a CPU and NCCL on CUDA run this same code. torch.distributed has no
authentication: what makes a transfer trustworthy is the digest that travels over HTTP, in calls that carry a token.
"""

import hashlib
import os
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo, Store, Work

from retort.config import ConfigError, secret
from retort.identity import NOBODY, Identity
from retort.rollouts import Message

_ROW_LANES = 2**10
_CACHED_ROWS = 2**7


def authorization(env: Mapping[str, str] = os.environ) -> str:
    """The `Authorization` header of every call of a weight sync. Raises ConfigError when there is no token."""
    token = secret("CONTROL_TOKEN", env)
    if not token:
        raise ConfigError(
            "CONTROL_TOKEN is not set: give the trainer and every rollout server the same secret in this environment "
            "variable, or in a file that CONTROL_TOKEN_FILE names (`retort run` does so by itself)."
        )
    return f"Bearer {token}"


class ProcessGroup(Protocol):
    """What is used of torch's process group backends, whose stubs leave it out."""

    def broadcast(self, tensors: list[Tensor], options: BroadcastOptions) -> Work: ...


class TensorSpec(Message, frozen=True, kw_only=True):
    """Name, shape and dtype of one tensor, as in the Hugging Face checkpoint."""

    name: str
    shape: list[int]
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype), self.dtype
        return dtype

    @property
    def num_bytes(self) -> int:
        return self.torch_dtype.itemsize * torch.Size(self.shape).numel()


class LoraBase(Message, frozen=True, kw_only=True):
    """The weights to which adapters are added (`retort.lora`), and by what their product is multiplied."""

    tensors: list[TensorSpec]
    scale: float


class WeightManifest(Message, frozen=True, kw_only=True):
    """What will be broadcast: the tensors in order, dealt to buckets."""

    buckets: list[list[TensorSpec]]
    lora_base: LoraBase | None = None
    """Adapters are sent, for this base, which every receiver reads from its own files. None: whole weights are sent."""

    @classmethod
    def of(cls, specs: Iterable[TensorSpec], bucket_bytes: int, lora_base: LoraBase | None = None) -> "WeightManifest":
        """Deal tensors to buckets of at most `bucket_bytes`; a larger tensor gets a bucket of its own."""
        buckets: list[list[TensorSpec]] = []
        room = 0
        for spec in specs:
            if not buckets or _padded(spec.num_bytes) > room:
                buckets.append([])
                room = bucket_bytes
            buckets[-1].append(spec)
            room -= _padded(spec.num_bytes)
        return cls(buckets=buckets, lora_base=lora_base)


class PrepareRequest(Message, frozen=True, kw_only=True):
    """Pause and expect a policy version. POST /weights/prepare, answered by `PrepareReply`."""

    epoch: int
    """The trainer's fencing token; a replica refuses one that is older than it has seen."""
    version: int
    manifest: WeightManifest
    identity: Identity = NOBODY
    """The trainer's; a replica of another refuses."""


class PrepareReply(Message, frozen=True, kw_only=True):
    num_workers: int
    """Processes of this replica that will receive; each has a rank of its own in the broadcast."""


class TransferRequest(Message, frozen=True, kw_only=True):
    """Join the process group and receive. POST /weights/transfer, answered by `TransferReply`."""

    epoch: int
    group: str
    """Names the process group: that of the transfer before, if it goes on. Who is late for another never meets this."""
    backend: str
    store_host: str
    store_port: int
    broadcast_rank: int
    """Rank of the replica's first worker; the sender is rank 0."""
    world_size: int
    deadline_s: float


class TransferReply(Message, frozen=True, kw_only=True):
    digests: list[list[int]]
    """One list per engine worker: the digest of every bucket, computed by the receiver from what it received.

    Where adapters were sent, that of the base to which it added them is one more.
    """


class ProbeRequest(Message, frozen=True, kw_only=True):
    """Load what was received and score the probe prompt with it. POST /weights/probe, answered by `ProbeReply`."""

    epoch: int
    prompt_ids: list[int]


class ProbeReply(Message, frozen=True, kw_only=True):
    logprobs: list[float]
    """Log-probability of every probe token but the first."""


class CommitRequest(Message, frozen=True, kw_only=True):
    """Serve the version from now on. POST /weights/commit."""

    epoch: int
    version: int


@dataclass(frozen=True)
class Snapshot:
    """The policy's weights at one version, packed and ready to send, with the digest of every bucket."""

    version: int
    manifest: WeightManifest
    buckets: list[Tensor]
    digests: list[int]
    """Of the buckets, and of the base where they hold adapters: what every receiver has to answer."""

    @classmethod
    def take(
        cls,
        version: int,
        manifest: WeightManifest,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        memory: Sequence[Tensor] = (),
        base_digest: int | None = None,
    ) -> "Snapshot":
        """Pack the manifest's tensors, which come in its order, one at a time; they are converted to its dtypes.

        `memory`: buckets of an earlier snapshot of the same manifest, which is gone then. Two never lie side by side.
        `base_digest`: of the weights to which the tensors are added, if they are adapters.
        """
        assert (manifest.lora_base is None) == (base_digest is None), "adapters come with the digest of their base"
        stream = iter(tensors)
        assert len(memory) in (0, len(manifest.buckets)), "the memory is of another manifest"
        given: Sequence[Tensor | None] = memory or [None] * len(manifest.buckets)
        buckets = [_pack(specs, stream, bucket) for specs, bucket in zip(manifest.buckets, given, strict=True)]
        digests = [bucket_digest(bucket) for bucket in buckets]
        return cls(version, manifest, buckets, digests if base_digest is None else [*digests, base_digest])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in the manifest's order; the tensors are views of the buckets."""
        for specs, bucket in zip(self.manifest.buckets, self.buckets, strict=True):
            yield from _unpack(bucket, specs)

    @property
    def digest(self) -> str:
        """One name for the weights: equal only if every bucket is."""
        text = ",".join(f"{digest:016x}" for digest in self.digests)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def bucket_digest(bucket: Tensor) -> int:
    """64 bits that stand for a byte bucket, computed on the device where it lies.

    Its 8-byte lanes are laid out as a matrix, and the sums of its rows and columns, modulo 2**64, are hashed. Whatever
    happens to one lane changes them, and so does a swap of two different ones, which are not in the same row and column
    as well. It guards against faults, not against forgery.
    """
    lanes = bucket.view(torch.int64)
    in_rows = len(lanes) // _ROW_LANES * _ROW_LANES
    matrix, rest = lanes[:in_rows].view(-1, _ROW_LANES), lanes[in_rows:]
    columns = torch.zeros(_ROW_LANES, dtype=torch.int64, device=bucket.device)
    columns[: len(rest)] = rest
    rows = [rest.sum(0, keepdim=True)]
    # Both sums of what lies in a CPU's cache, one after the other. A GPU takes all at once.
    for piece in matrix.split(_CACHED_ROWS if bucket.device.type == "cpu" else max(len(matrix), 1)):
        rows.append(piece.sum(1))
        columns += piece.sum(0)
    sums = torch.cat([*rows, columns]).cpu().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(sums, digest_size=8).digest(), "little")


def open_process_group(
    backend: str, store: Store, name: str, *, rank: int, world_size: int, timeout_s: float
) -> ProcessGroup:
    """A process group of its own beside whatever groups the process already has.

    Raises RuntimeError (from torch) when a member does not show up within `timeout_s`.
    """
    timeout = timedelta(seconds=timeout_s)
    prefixed = PrefixStore(f"retort/{name}", store)
    # All have to be there before anything begins that has no deadline, as NCCL's own start has none.
    prefixed.set(f"here/{rank}", "")
    prefixed.wait([f"here/{other}" for other in range(world_size)], timeout)
    if backend == "gloo":
        return cast(ProcessGroup, ProcessGroupGloo(prefixed, rank, world_size, timeout))
    from torch.distributed.distributed_c10d import ProcessGroupNCCL  # only in CUDA builds

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return cast(ProcessGroup, ProcessGroupNCCL(prefixed, rank, world_size, options))


Received = tuple[list[tuple[str, Tensor]], int]
"""(name, tensor) pairs of a bucket, and the digest of the bytes that arrived."""


BUCKETS_HELD = 3
"""By a receiver at a time: one is loaded while the next two arrive. So many are kept for the next transfer."""
MOST_KEPT = 2**28
"""Bytes of a bucket whose memory is kept: not of one that an embedding has made larger than buckets are meant to be."""


class BucketMemory:
    """What buckets are received into. On a CPU, bytes that no tensor views any more serve the next bucket or transfer.

    New memory costs a CPU more than all else that a receiver does: the kernel clears it page by page. On a GPU torch
    itself keeps what was used before.
    """

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self, num_bytes: int, device: torch.device) -> Tensor:
        """So many bytes, with anything in them."""
        if device.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        memory = self._free.pop() if self._free else bytearray()
        if not memory or len(memory) < num_bytes:
            memory = bytearray(num_bytes or 1)
        lent = memoryview(memory)  # lives as long as the last tensor that views it
        weakref.finalize(lent, self._give_back, memory)
        return torch.frombuffer(lent, dtype=torch.uint8)[:num_bytes]

    def _give_back(self, memory: bytearray) -> None:
        if len(self._free) < BUCKETS_HELD and len(memory) <= MOST_KEPT:
            self._free.append(memory)


class Membership:
    """A receiver's place in the process group of the transfers, and its memory for them."""

    def __init__(self) -> None:
        self._memory = BucketMemory()
        self._name = ""
        self._group: ProcessGroup | None = None

    def receive(
        self, request: TransferRequest, manifest: WeightManifest, device: torch.device, worker: int = 0
    ) -> "Iterator[Received]":
        """Take part in a transfer: join its process group, unless it goes on, and `receive`, all within its deadline.

        `worker` counts the processes of a replica from 0. Only a group with which all went well is there for the next.
        """
        deadline = time.monotonic() + request.deadline_s
        group, self._group = self._group, None
        if group is None or request.group != self._name:
            group = _join(request, worker, deadline)
        yield from receive(group, manifest, device, self._memory, deadline - time.monotonic())
        self._name, self._group = request.group, group


def _join(request: TransferRequest, worker: int, deadline: float) -> ProcessGroup:
    store = TCPStore(request.store_host, request.store_port, timeout=timedelta(seconds=request.deadline_s))
    return open_process_group(
        request.backend,
        store,
        request.group,
        rank=request.broadcast_rank + worker,
        world_size=request.world_size,
        timeout_s=max(deadline - time.monotonic(), 0.001),
    )


def send(group: ProcessGroup, snapshot: Snapshot, timeout_s: float) -> None:
    """Broadcast every bucket as rank 0, all within `timeout_s`. Raises RuntimeError when a receiver is gone or late."""
    deadline = time.monotonic() + timeout_s
    with _stream_of_its_own(snapshot):
        for number, bucket in enumerate(snapshot.buckets):
            broadcast(group, bucket, _seconds_left(deadline, number, len(snapshot.buckets)))


def _stream_of_its_own(snapshot: Snapshot) -> AbstractContextManager[object]:
    """On CUDA all threads share a stream, and what the trainer computes next would wait there for the broadcast.

    The snapshot is complete: its digests have been read.
    """
    device = snapshot.buckets[0].device if snapshot.buckets else torch.device("cpu")
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def receive(
    group: ProcessGroup, manifest: WeightManifest, device: torch.device, memory: BucketMemory, timeout_s: float
) -> Iterator[Received]:
    """Yield every bucket's tensors and digest. The next two arrive meanwhile.

    Raises RuntimeError when not all are there within `timeout_s`, the caller's time included.
    """
    deadline = time.monotonic() + timeout_s
    arriving: deque[tuple[Tensor, Work]] = deque()
    for number, specs in enumerate(manifest.buckets):
        left_s = _seconds_left(deadline, number, len(manifest.buckets))
        for ahead in manifest.buckets[number + len(arriving) : number + BUCKETS_HELD]:
            # Not in turns: an engine may keep views until a whole layer has arrived.
            buffer = memory.take(_bucket_bytes(ahead), device)
            arriving.append((buffer, _start_broadcast(group, buffer, left_s)))
        bucket, work = arriving.popleft()
        work.wait(timedelta(seconds=left_s))
        yield list(_unpack(bucket, specs)), bucket_digest(bucket)


def broadcast(group: ProcessGroup, buffer: Tensor, timeout_s: float) -> None:
    """Send the buffer from rank 0 into everybody's. Raises RuntimeError when a member is gone or late."""
    _start_broadcast(group, buffer, timeout_s).wait(timedelta(seconds=timeout_s))


def _seconds_left(deadline: float, done: int, buckets: int) -> float:
    if (left_s := deadline - time.monotonic()) <= 0:
        raise RuntimeError(f"the deadline of the transfer passed after {done} of {buckets} buckets")
    return left_s


def _start_broadcast(group: ProcessGroup, buffer: Tensor, timeout_s: float) -> Work:
    options = BroadcastOptions()
    options.rootRank = 0
    options.timeout = timedelta(seconds=timeout_s)
    return group.broadcast([buffer], options)


def _padded(num_bytes: int) -> int:
    """Tensors start at multiples of 16 bytes, so that any dtype can view its slice and the digest sees whole lanes."""
    return -(-num_bytes // 16) * 16


def _pack(specs: Sequence[TensorSpec], tensors: Iterator[tuple[str, Tensor]], bucket: Tensor | None) -> Tensor:
    start = 0
    for spec in specs:
        name, tensor = next(tensors)
        assert name == spec.name and list(tensor.shape) == spec.shape, f"{name} came where {spec.name} was announced"
        if bucket is None:
            bucket = torch.zeros(_bucket_bytes(specs), dtype=torch.uint8, device=tensor.device)
        _view(bucket, start, spec).copy_(tensor)
        start += _padded(spec.num_bytes)
    assert bucket is not None
    return bucket


def _bucket_bytes(specs: Sequence[TensorSpec]) -> int:
    return sum(_padded(spec.num_bytes) for spec in specs)


def _view(bucket: Tensor, start: int, spec: TensorSpec) -> Tensor:
    return bucket[start : start + spec.num_bytes].view(spec.torch_dtype).view(spec.shape)


def _unpack(bucket: Tensor, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    start = 0
    for spec in specs:
        yield spec.name, _view(bucket, start, spec)
        start += _padded(spec.num_bytes)
