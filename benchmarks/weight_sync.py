"""`python -m benchmarks.weight_sync`: the weight transfer beside a bare broadcast of the same bytes, over gloo.

Receivers are processes that do what a vLLM worker does with the wire: receive every bucket, digest it, copy its tensors
into a model. Verified: without that copy. Bare: the same buckets broadcast into a buffer, and nothing else. They take
turns in one run; the least of the repetitions counts, because other work on the machine only ever adds to it. CPU
seconds are those of the sender and of all receivers together.
"""

import argparse
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch.distributed import TCPStore

from retort.weight_sync import (
    BucketMemory,
    Snapshot,
    TensorSpec,
    WeightManifest,
    broadcast,
    open_process_group,
    receive,
    send,
)

TIMEOUT_S = 120.0
CPU = torch.device("cpu")
KINDS = ("bare", "verified", "transfer")
Measured = dict[str, list[float]]


def manifest_of(mib: int, bucket_mib: int) -> WeightManifest:
    """A model of about `mib` MiB in bfloat16: layers of seven matrices, as large as those of a 4B model."""
    shapes = [[4096, 2560], [1024, 2560], [1024, 2560], [2560, 4096], [9728, 2560], [9728, 2560], [2560, 9728]]
    specs: list[TensorSpec] = []
    while sum(spec.num_bytes for spec in specs) < mib * 2**20:
        number = len(specs)
        specs.append(TensorSpec(name=f"{number}", shape=shapes[number % len(shapes)], dtype="bfloat16"))
    return WeightManifest.of(specs, bucket_mib * 2**20)


def tensors_of(manifest: WeightManifest) -> Iterator[tuple[str, Tensor]]:
    for spec in (spec for bucket in manifest.buckets for spec in bucket):
        yield spec.name, torch.full(spec.shape, float(len(spec.name)))


def receiver(port: int, rank: int, size: int, repeats: int, manifest: WeightManifest, done: Connection) -> None:
    """Says after each kind, in turn, what its CPU seconds were and which digests it found."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port)
    model = {spec.name: torch.zeros(spec.shape, dtype=torch.bfloat16) for b in manifest.buckets for spec in b}
    buffers = [torch.zeros(num_bytes, dtype=torch.uint8) for num_bytes in bucket_bytes(manifest)]
    memory = BucketMemory()
    for number in range(repeats):
        for kind in KINDS:
            group = open_process_group(
                "gloo", store, f"{kind} {number}", rank=rank, world_size=size, timeout_s=TIMEOUT_S
            )
            cpu_s, digests = time.process_time(), []
            if kind == "bare":
                for buffer in buffers:
                    broadcast(group, buffer, TIMEOUT_S)
            else:
                for tensors, digest in receive(group, manifest, CPU, memory, TIMEOUT_S):
                    for name, tensor in tensors if kind == "transfer" else ():
                        model[name].copy_(tensor)
                    digests.append(digest)
            done.send((time.process_time() - cpu_s, digests))


def bucket_bytes(manifest: WeightManifest) -> list[int]:
    return [sum(spec.num_bytes for spec in bucket) for bucket in manifest.buckets]


def measure(num_receivers: int, manifest: WeightManifest, repeats: int) -> Measured:
    """Seconds of each repetition: taking the snapshot, opening the group, the bare broadcast, the transfer."""
    context = multiprocessing.get_context("spawn")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world_size = 1 + num_receivers
    pipes = []
    for rank in range(1, world_size):
        ours, theirs = context.Pipe()
        arguments = (store.port, rank, world_size, repeats, manifest, theirs)
        context.Process(target=receiver, args=arguments, daemon=True).start()
        pipes.append(ours)
    measured: Measured = defaultdict(list)
    for number in range(repeats):
        start = time.perf_counter()
        snapshot = Snapshot.take(number, manifest, tensors_of(manifest))
        measured["snapshot"].append(time.perf_counter() - start)
        for kind in KINDS:
            start = time.perf_counter()
            group = open_process_group(
                "gloo", store, f"{kind} {number}", rank=0, world_size=world_size, timeout_s=TIMEOUT_S
            )
            measured["open"].append(time.perf_counter() - start)
            start, cpu_s = time.perf_counter(), time.process_time()
            send(group, snapshot, TIMEOUT_S)
            cpu_s = time.process_time() - cpu_s
            answers = [pipe.recv() for pipe in pipes]
            measured[kind].append(time.perf_counter() - start)
            measured[f"{kind} CPU"].append(cpu_s + sum(of_receiver for of_receiver, _ in answers))
            assert kind == "bare" or [digests for _, digests in answers] == [snapshot.digests] * num_receivers
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weight_sync", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the model")
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    manifest = manifest_of(args.mib, args.bucket_mib)
    gigabytes = sum(spec.num_bytes for bucket in manifest.buckets for spec in bucket) / 1e9
    print(f"{gigabytes:.2f} GB in {len(manifest.buckets)} buckets, least of {args.repeats}")
    print("receivers  snapshot  open group  bare     verified  ratio  transfer  ratio  CPU: bare  verified  transfer")
    for count in args.receivers:
        least = {phase: min(seconds) for phase, seconds in measure(count, manifest, args.repeats).items()}
        print(
            f"{count:<9}  {least['snapshot']:<8.2f}  {least['open']:<10.3f}  {least['bare']:<7.2f}  "
            f"{least['verified']:<8.2f}  {least['verified'] / least['bare']:<5.2f}  "
            f"{least['transfer']:<8.2f}  {least['transfer'] / least['bare']:<5.2f}  "
            f"{least['bare CPU']:<9.2f}  {least['verified CPU']:<8.2f}  {least['transfer CPU']:.2f}"
        )


if __name__ == "__main__":
    main()
