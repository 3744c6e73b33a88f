"""`python -m benchmarks.weight_sync`: the weight transfer beside a bare broadcast of the same bytes.

Receivers are processes that do what a vLLM worker does with the wire: receive every bucket, digest it, copy its tensors
into a model. Verified: without that copy. Bare: the same buckets broadcast into a buffer, and nothing else. They take
turns in one run; the least of the repetitions counts, because other work on the machine only ever adds to it. CPU
seconds are those of the sender and of all receivers together. `benchmarks.weight_pause` has a real replica instead.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

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
from services.trainer.operations import finish

TIMEOUT_S = 120.0
BACKENDS = ("gloo", "nccl")
ONE_GPU = (
    'NCCL needs a GPU for each rank and refuses two on one ("Duplicate GPU detected"). This needs {needed} GPUs, and '
    "torch sees {seen}."
)
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


def tensors_of(manifest: WeightManifest, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for spec in (spec for bucket in manifest.buckets for spec in bucket):
        yield spec.name, torch.full(spec.shape, float(len(spec.name)), device=device)


def device_of(rank: int, backend: str) -> torch.device:
    return torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")


def receiver(
    port: int,
    rank: int,
    size: int,
    repeats: int,
    manifest: WeightManifest,
    backend: str,
    kinds: Sequence[str],
    done: Connection,
) -> None:
    """Says after each kind, in turn, what its CPU seconds were and which digests it found."""
    torch.set_num_threads(1)
    device = device_of(rank, backend)
    store = TCPStore("127.0.0.1", port)
    specs = [spec for bucket in manifest.buckets for spec in bucket] if "transfer" in kinds else []
    model = {spec.name: torch.zeros(spec.shape, dtype=spec.torch_dtype, device=device) for spec in specs}
    buffers = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for num_bytes in bucket_bytes(manifest)]
    memory = BucketMemory()
    for number in range(repeats):
        for kind in kinds:
            group = open_process_group(
                backend, store, f"{kind} {number}", rank=rank, world_size=size, timeout_s=TIMEOUT_S
            )
            cpu_s, digests = time.process_time(), []
            if kind == "bare":
                for buffer in buffers:
                    broadcast(group, buffer, TIMEOUT_S)
            else:
                for tensors, digest in receive(group, manifest, device, memory, TIMEOUT_S):
                    for name, tensor in tensors if kind == "transfer" else ():
                        model[name].copy_(tensor)
                    digests.append(digest)
            finish(device)
            done.send((time.process_time() - cpu_s, digests))


def bucket_bytes(manifest: WeightManifest) -> list[int]:
    return [sum(spec.num_bytes for spec in bucket) for bucket in manifest.buckets]


def measure(
    num_receivers: int,
    manifest: WeightManifest,
    repeats: int,
    backend: str,
    kinds: Sequence[str] = KINDS,
) -> Measured:
    """Seconds of each repetition: taking the snapshot, opening the group, and each kind of broadcast."""
    context = multiprocessing.get_context("spawn")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world_size = 1 + num_receivers
    pipes = []
    for rank in range(1, world_size):
        ours, theirs = context.Pipe()
        arguments = (store.port, rank, world_size, repeats, manifest, backend, kinds, theirs)
        context.Process(target=receiver, args=arguments, daemon=True).start()
        theirs.close()  # or nobody would notice that a receiver has ended
        pipes.append(ours)
    device = device_of(0, backend)
    measured: Measured = defaultdict(list)
    for number in range(repeats):
        start = time.perf_counter()
        snapshot = Snapshot.take(number, manifest, tensors_of(manifest, device))
        measured["snapshot"].append(time.perf_counter() - start)
        for kind in kinds:
            start = time.perf_counter()
            group = open_process_group(
                backend, store, f"{kind} {number}", rank=0, world_size=world_size, timeout_s=TIMEOUT_S
            )
            measured["open"].append(time.perf_counter() - start)
            start, cpu_s = time.perf_counter(), time.process_time()
            send(group, snapshot, TIMEOUT_S)
            cpu_s = time.process_time() - cpu_s
            answers = [answer_of(pipe, f"receiver {rank}, {kind}") for rank, pipe in enumerate(pipes, start=1)]
            measured[kind].append(time.perf_counter() - start)
            measured[f"{kind} CPU"].append(cpu_s + sum(of_receiver for of_receiver, _ in answers))
            assert kind == "bare" or [digests for _, digests in answers] == [snapshot.digests] * num_receivers
    return measured


def answer_of(pipe: Connection, who: str) -> tuple[float, list[int]]:
    if not pipe.poll(TIMEOUT_S):
        raise SystemExit(f"{who}: no answer within {TIMEOUT_S:g} s")
    try:
        answer: tuple[float, list[int]] = pipe.recv()
    except EOFError:
        raise SystemExit(f"{who}: it has ended; its last words are above") from None
    return answer


def side_by_side(count: int, manifest: WeightManifest, repeats: int, backend: str) -> dict[str, float]:
    """The least seconds of each, with so many receivers."""
    least = {phase: min(seconds) for phase, seconds in measure(count, manifest, repeats, backend).items()}
    ratios = {f"{kind} over bare": least[kind] / least["bare"] for kind in KINDS[1:]}
    return {"receivers": count, **least, **ratios}


def table(rows: Sequence[dict[str, float]]) -> Iterator[str]:
    yield "receivers  snapshot  open group  bare     verified  ratio  transfer  ratio  CPU: bare  verified  transfer"
    for row in rows:
        yield (
            f"{row['receivers']:<9}  {row['snapshot']:<8.2f}  {row['open']:<10.3f}  {row['bare']:<7.3f}  "
            f"{row['verified']:<8.3f}  {row['verified over bare']:<5.2f}  "
            f"{row['transfer']:<8.3f}  {row['transfer over bare']:<5.2f}  "
            f"{row['bare CPU']:<9.2f}  {row['verified CPU']:<8.2f}  {row['transfer CPU']:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weight_sync", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the model; Qwen3-4B has 7680")
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument(
        "--backend", choices=BACKENDS, default="gloo", help="nccl: a GPU for each rank, sender included"
    )
    parser.add_argument("--json", action="store_true", help="one object instead of lines")
    args = parser.parse_args()
    seen = torch.cuda.device_count()
    if args.backend == "nccl" and seen < (needed := 1 + max(args.receivers)):
        parser.error(ONE_GPU.format(needed=needed, seen=seen))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the receivers end with this process
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    manifest = manifest_of(args.mib, args.bucket_mib)
    gigabytes = sum(spec.num_bytes for bucket in manifest.buckets for spec in bucket) / 1e9
    rows = [side_by_side(count, manifest, args.repeats, args.backend) for count in args.receivers]
    found: dict[str, Any] = {"load_before": load, "cores": os.cpu_count(), "backend": args.backend}
    found |= {"gigabytes": gigabytes, "buckets": len(manifest.buckets), "least_of": args.repeats, "fleets": rows}
    if args.json:
        print(json.dumps(found))
        return
    print(f"{gigabytes:.2f} GB in {len(manifest.buckets)} buckets over {args.backend}, least of {args.repeats}")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
