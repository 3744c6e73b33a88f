"""What is broadcast arrives as it was, or is seen not to: buckets, packing, digests, and two processes over gloo."""

import hashlib
import multiprocessing
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.distributed import TCPStore

from retort.weight_sync import (
    BucketMemory,
    ProcessGroup,
    Snapshot,
    TensorSpec,
    WeightManifest,
    bucket_digest,
    open_process_group,
    receive,
    send,
)

DTYPES = ["float32", "bfloat16", "float16", "uint8", "int64"]
SPECS = st.lists(
    st.builds(
        TensorSpec,
        name=st.uuids().map(str),
        shape=st.lists(st.integers(0, 7), max_size=3),
        dtype=st.sampled_from(DTYPES),
    ),
    min_size=1,
    max_size=12,
)
LANES = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20)


def spec(name: str, num_bytes: int) -> TensorSpec:
    return TensorSpec(name=name, shape=[num_bytes], dtype="uint8")


def random_tensor(one: TensorSpec) -> torch.Tensor:
    return torch.randint(0, 100, one.shape).to(one.torch_dtype)


def num_bytes(bucket: list[TensorSpec]) -> int:
    """As in the buffer that is sent: every tensor starts at a multiple of 16 bytes."""
    return sum(-(-one.num_bytes // 16) * 16 for one in bucket)


def digest_of(lanes: list[int]) -> int:
    return bucket_digest(torch.tensor(lanes, dtype=torch.int64).view(torch.uint8))


def received_from(snapshot: Snapshot) -> list[tuple[str, torch.Tensor]]:
    """What `receive` would make of the snapshot's bytes."""
    group, cpu = cast(ProcessGroup, Loopback(snapshot)), torch.device("cpu")
    received = list(receive(group, snapshot.manifest, cpu, BucketMemory(), timeout_s=1.0))
    assert [digest for _, digest in received] == snapshot.digests
    return [pair for tensors, _ in received for pair in tensors]


class Loopback:
    """A process group whose broadcast hands over a snapshot's buckets in order, without a process."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.received = 0

    def broadcast(self, tensors: list[torch.Tensor], options: object) -> "Loopback":
        tensors[0].copy_(self.snapshot.buckets[self.received])
        self.received += 1
        return self

    def wait(self, timeout: timedelta) -> None:
        """It is here already."""


def test_tensors_are_dealt_to_buckets_in_order_until_one_is_full() -> None:
    specs = [spec("a", 32), spec("b", 32), spec("c", 48), spec("d", 200), spec("e", 16)]
    manifest = WeightManifest.of(specs, bucket_bytes=64)
    assert [[one.name for one in bucket] for bucket in manifest.buckets] == [["a", "b"], ["c"], ["d"], ["e"]]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a loaded machine
@given(specs=SPECS, limit=st.integers(1, 4096))
def test_every_tensor_is_in_one_bucket_and_no_bucket_of_several_is_too_large(
    specs: list[TensorSpec], limit: int
) -> None:
    buckets = WeightManifest.of(specs, limit).buckets
    assert [one for bucket in buckets for one in bucket] == specs
    assert all(buckets)
    assert [bucket for bucket in buckets if len(bucket) > 1 and num_bytes(bucket) > limit] == []


def test_nothing_to_send_is_no_bucket() -> None:
    assert WeightManifest.of([], 64).buckets == []


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a loaded machine
@given(specs=SPECS, limit=st.integers(1, 4096))
def test_what_was_packed_is_unpacked_as_it_was(specs: list[TensorSpec], limit: int) -> None:
    tensors = [(one.name, random_tensor(one)) for one in specs]
    snapshot = Snapshot.take(7, WeightManifest.of(specs, limit), tensors)
    received = received_from(snapshot)
    assert [name for name, _ in received] == [name for name, _ in tensors]
    for (_, sent), (_, arrived) in zip(tensors, received, strict=True):
        assert arrived.dtype == sent.dtype
        assert torch.equal(arrived, sent)


def test_a_manifest_travels_as_bytes() -> None:
    manifest = WeightManifest.of([spec("a", 32), spec("b", 48)], bucket_bytes=64)
    assert WeightManifest.from_bytes(manifest.to_bytes()) == manifest


def test_tensors_are_converted_to_the_served_dtype() -> None:
    served = TensorSpec(name="norm", shape=[3], dtype="bfloat16")
    weights = torch.tensor([1.0, 1 / 3, -2.0])
    ((_, arrived),) = received_from(Snapshot.take(0, WeightManifest.of([served], 64), [("norm", weights)]))
    assert arrived.dtype == torch.bfloat16
    assert torch.equal(arrived, weights.bfloat16())


def test_a_tensor_out_of_turn_is_an_error() -> None:
    manifest = WeightManifest.of([spec("a", 16), spec("b", 16)], 64)
    tensors = [("b", torch.zeros(16, dtype=torch.uint8)), ("a", torch.zeros(16, dtype=torch.uint8))]
    with pytest.raises(AssertionError, match="b came where a was announced"):
        Snapshot.take(0, manifest, tensors)


@pytest.mark.parametrize("count", [0, 2, 1024, 1026, 2**18 + 2])
def test_the_digest_is_a_hash_of_the_sums_of_rows_and_columns(count: int) -> None:
    """The row that is not full comes first."""
    lanes = [(7**19 * index) % 2**63 for index in range(count)]
    rows = [lanes[start : start + 1024] for start in range(0, count // 1024 * 1024, 1024)]
    rest = lanes[len(rows) * 1024 :]
    padded = [*rows, rest + [0] * (1024 - len(rest))]
    sums = [sum(rest), *map(sum, rows), *map(sum, zip(*padded, strict=True))]
    hashed = hashlib.blake2b(b"".join((one % 2**64).to_bytes(8, "little") for one in sums), digest_size=8)
    assert digest_of(lanes) == int.from_bytes(hashed.digest(), "little")


@given(lanes=LANES, data=st.data())
def test_any_flipped_bit_changes_the_digest(lanes: list[int], data: st.DataObject) -> None:
    bucket = torch.tensor(lanes, dtype=torch.int64)
    damaged = bucket.clone().view(torch.uint8)
    damaged[data.draw(st.integers(0, damaged.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert bucket_digest(damaged) != bucket_digest(bucket.view(torch.uint8))


@given(lanes=LANES, data=st.data())
def test_any_other_lane_changes_the_digest(lanes: list[int], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(lanes) - 1))
    other = data.draw(st.integers(-(2**63), 2**63 - 1))
    assume(other != lanes[index])
    assert digest_of([*lanes[:index], other, *lanes[index + 1 :]]) != digest_of(lanes)


@given(weights=st.lists(st.floats(width=32), min_size=4, max_size=4, unique=True), distance=st.integers(1, 2000))
def test_swapped_weights_change_the_digest(weights: list[float], distance: int) -> None:
    one, other = torch.tensor(weights, dtype=torch.float32).view(torch.int64).tolist()
    between = [0] * (distance - 1)
    assert digest_of([one, *between, other]) != digest_of([other, *between, one])


@pytest.mark.parametrize("upper", [(0.5, -0.5), (1.0, 2.0), (0.0, -0.0)])
@pytest.mark.parametrize("distance", [1, 2, 1024])
def test_swapped_weights_that_differ_in_one_high_bit_change_the_digest(
    upper: tuple[float, float], distance: int
) -> None:
    weights = torch.tensor([0.25, upper[0], 0.25, upper[1]])
    one, other = weights.view(torch.int64).tolist()
    between = [0] * (distance - 1)
    assert digest_of([one, *between, other]) != digest_of([other, *between, one])


def test_the_name_of_the_weights_depends_on_every_bucket() -> None:
    specs = [spec("a", 16), spec("b", 16)]
    manifest = WeightManifest.of(specs, 16)
    tensors = [("a", torch.zeros(16, dtype=torch.uint8)), ("b", torch.ones(16, dtype=torch.uint8))]
    snapshot = Snapshot.take(1, manifest, tensors)
    assert len(snapshot.buckets) == 2
    assert snapshot.digest == Snapshot.take(2, manifest, tensors).digest
    for index in range(2):
        changed = [(name, tensor + (place == index)) for place, (name, tensor) in enumerate(tensors)]
        assert Snapshot.take(1, manifest, changed).digest != snapshot.digest


@pytest.fixture
def store() -> Iterator[TCPStore]:
    yield TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


MANIFEST = WeightManifest.of(
    [
        TensorSpec(name="embed", shape=[301, 7], dtype="float32"),
        TensorSpec(name="norm", shape=[5], dtype="bfloat16"),
        TensorSpec(name="scale", shape=[], dtype="float32"),
    ],
    bucket_bytes=4096,
)


def some_weights() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    specs = [one for bucket in MANIFEST.buckets for one in bucket]
    return [(one.name, torch.randn(one.shape, generator=generator)) for one in specs]


def receiver(port: int, answers: "multiprocessing.Queue[list[int]]") -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=20))
    group = open_process_group("gloo", store, "one", rank=1, world_size=2, timeout_s=20.0)
    snapshot = Snapshot.take(3, MANIFEST, some_weights())
    tensors = []
    for pairs, digest in receive(group, MANIFEST, torch.device("cpu"), BucketMemory(), timeout_s=20.0):
        answers.put([digest])
        tensors += pairs
    sent = received_from(snapshot)
    answers.put([sum(torch.equal(mine, theirs[1]) for (_, mine), theirs in zip(tensors, sent, strict=True))])


def test_another_process_receives_the_same_bytes_and_digests(store: TCPStore) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[list[int]] = context.Queue()
    process = context.Process(target=receiver, args=(store.port, answers), daemon=True)
    process.start()
    snapshot = Snapshot.take(3, MANIFEST, some_weights())
    group = open_process_group("gloo", store, "one", rank=0, world_size=2, timeout_s=60.0)
    send(group, snapshot, timeout_s=20.0)
    digests = [answers.get(timeout=20)[0] for _ in snapshot.buckets]
    assert digests == snapshot.digests
    assert answers.get(timeout=20) == [3]
    process.join(20)
    assert process.exitcode == 0


def test_the_memory_of_a_bucket_is_used_again_when_nobody_views_it_any_more(store: TCPStore) -> None:
    """Nine buckets a transfer; three are held at a time, and here the caller holds one more, or all nine at once."""
    manifest = WeightManifest.of([spec(f"{number}", 64) for number in range(9)], 64)
    group = open_process_group("gloo", store, "alone", rank=0, world_size=1, timeout_s=20.0)
    memory = BucketMemory()

    def received() -> Iterator[torch.Tensor]:
        for [(_, tensor)], _ in receive(group, manifest, torch.device("cpu"), memory, timeout_s=20.0):
            yield tensor

    first = {tensor.data_ptr() for tensor in received()}
    assert len(first) <= 4
    assert len({tensor.data_ptr() for tensor in list(received())}) == 9
    assert len({tensor.data_ptr() for tensor in received()}) <= 4


def test_the_next_transfer_finds_the_memory_of_three_buckets_and_a_larger_one_new_memory(store: TCPStore) -> None:
    memory, cpu = BucketMemory(), torch.device("cpu")
    held = [memory.take(64, cpu) for _ in range(5)]
    addresses = {tensor.data_ptr() for tensor in held}
    del held
    again = [memory.take(32, cpu) for _ in range(5)]
    assert len(addresses & {tensor.data_ptr() for tensor in again[:3]}) == 3
    assert [len(tensor) for tensor in again] == [32] * 5
    del again
    larger = [memory.take(128, cpu) for _ in range(3)]
    for number, tensor in enumerate(larger):
        tensor.fill_(number)
    assert [tensor.sum().item() for tensor in larger] == [0, 128, 256]


def test_the_memory_of_a_bucket_larger_than_buckets_are_meant_to_be_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("retort.weight_sync.MOST_KEPT", 100)
    memory, cpu = BucketMemory(), torch.device("cpu")
    held = [memory.take(size, cpu) for size in (101, 100, 101)]
    del held
    assert [len(kept) for kept in memory._free] == [100]


def test_the_deadline_is_one_for_all_buckets_and_not_for_each(store: TCPStore) -> None:
    """Nine buckets of which each takes 0.2 s, with half a second for all."""
    manifest = WeightManifest.of([spec(f"{number}", 64) for number in range(9)], 64)
    group = open_process_group("gloo", store, "slow", rank=0, world_size=1, timeout_s=20.0)
    with pytest.raises(RuntimeError, match=r"the deadline of the transfer passed after [1-3] of 9 buckets"):
        for _ in receive(group, manifest, torch.device("cpu"), BucketMemory(), timeout_s=0.5):
            time.sleep(0.2)


def test_a_receiver_that_never_comes_is_an_error_within_the_deadline(store: TCPStore) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        open_process_group("gloo", store, "alone", rank=0, world_size=2, timeout_s=1.0)
    assert time.monotonic() - start < 5.0


def test_a_receiver_that_joins_and_dies_is_an_error_within_the_deadline(store: TCPStore) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=join_and_leave, args=(store.port,), daemon=True)
    process.start()
    group = open_process_group("gloo", store, "gone", rank=0, world_size=2, timeout_s=60.0)
    process.join(20)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        send(group, Snapshot.take(3, MANIFEST, some_weights()), timeout_s=2.0)
    assert time.monotonic() - start < 10.0


def join_and_leave(port: int) -> None:
    store = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=20))
    open_process_group("gloo", store, "gone", rank=1, world_size=2, timeout_s=20.0)
