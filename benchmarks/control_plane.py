"""`python -m benchmarks.control_plane`: groups a second through the queue, beside bare Redis in the same run.

A trainer (queue and reader), replicas (sampler, presence and queue, in processes of their own) and a Valkey are the
services' own; engines and scoring take next to no time. Bare: as many bytes through the same Valkey by one client with
pipelined XADD, XREADGROUP, XREAD, XACK and XDEL. Both take turns, each rate is the median of its rounds.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, cast

import uvloop
from redis import Redis

from retort.queues import RolloutQueue, TrainerQueue, connect, connect_async
from retort.queues.protocol import Keys
from retort.rollouts import RolloutGroup, SamplingParameters, WorkItem, sample_seed
from retort.weight_sync import CommitRequest, PrepareRequest, ProbeRequest, TransferRequest, WeightManifest
from services.rollout.__main__ import run_until_drained
from services.rollout.engine_steps import TokenTime
from services.rollout.presence import Presence
from services.rollout.reward_client import RewardClient, Scored
from services.rollout.sampler import Sampler
from services.rollout.simulated_engine import Lengths, SimulatedEngine
from services.rollout.weight_receiver import WeightReceiver
from services.trainer.admission import GroupReader
from simulation.command import own_valkey

GROUP_SIZE, GROUPS_PER_STEP, PROMPT_TOKENS = 8, 256, 128
CONCURRENT_GROUPS = 64
LEASE_S, STALL_S, MAX_DELIVERIES = 60.0, 60.0, 3
QUICK = TokenTime(1e-4, 0.0)
"""Longer completions than a loop's clock is coarse: uvloop calls at once what is to be called in less than 0.5 ms."""
BARE_AT_ONCE = 64


class NoScoring:
    """Says of every completion at once that it is right."""

    async def score(self, checker: str, completions: Sequence[str], answer: str) -> list[Scored]:
        return [Scored(1.0, "A", True) for _ in completions]


def replica(url: str, run: str, name: str, tokens: int, done: Connection) -> None:
    uvloop.run(_replica(url, run, name, tokens, done))


async def _replica(url: str, run: str, name: str, tokens: int, done: Connection) -> None:
    engine = SimulatedEngine(QUICK, CONCURRENT_GROUPS * GROUP_SIZE, Lengths(tokens, 0.0), transfer_s=0.0)
    receiver = WeightReceiver(engine)
    await _serve_version_0(receiver)
    redis = await connect_async(url)
    queue = RolloutQueue(redis, run, name, LEASE_S, MAX_DELIVERIES)
    await queue.declare()
    sampler = Sampler(
        name=name,
        queue=queue,
        engine=engine,
        receiver=receiver,
        reward=cast(RewardClient, NoScoring()),
        decode=lambda _: "",
        concurrent_groups=CONCURRENT_GROUPS,
        lease_s=LEASE_S,
        max_deliveries=MAX_DELIVERIES,
    )
    draining = asyncio.Event()
    asyncio.get_running_loop().add_reader(done.fileno(), draining.set)
    done.send(())
    cpu = time.process_time()
    presence = Presence(name, queue, http_url="", control_url="")
    await run_until_drained(sampler, presence, engine, [], draining)
    done.send(time.process_time() - cpu)
    await redis.aclose()


async def _serve_version_0(receiver: WeightReceiver) -> None:
    manifest = WeightManifest(buckets=[])
    await receiver.prepare(PrepareRequest(epoch=1, version=0, manifest=manifest))
    nothing = TransferRequest(
        epoch=1, group="", backend="", store_host="", store_port=0, broadcast_rank=1, world_size=2, deadline_s=1.0
    )
    await receiver.transfer(nothing)
    await receiver.probe(ProbeRequest(epoch=1, prompt_ids=[]))
    await receiver.commit(CommitRequest(epoch=1, version=0))


@contextmanager
def replicas(url: str, run: str, count: int, tokens: int) -> Iterator[list[float]]:
    """So many, all serving; the list holds their CPU seconds once they have left."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, cpu_s = [], [], list[float]()
    for number in range(count):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=replica, args=(url, run, f"rollout-{number}", tokens, theirs)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    try:
        yield cpu_s
        for pipe in pipes:
            pipe.send(())
        cpu_s += [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


class Trainer:
    """Issues steps, one ahead of the one that it collects, and lets them go when they are there."""

    def __init__(self, redis: Redis, run: str) -> None:
        self._queue = TrainerQueue(redis, run, epoch=1)
        self._queue.open()
        self._reader = GroupReader(self._queue, "train", idle=lambda _: None, stall_s=STALL_S)
        self._step = 0

    def train(self, steps: int) -> RolloutGroup:
        """So many steps; returns the last group."""
        first, last = self._step + 1, self._step + steps
        self._queue.issue(_items(first))
        for step in range(first, last + 1):
            if step < last:
                self._queue.issue(_items(step + 1))
            groups = self._reader.collect(_items(step))
            self._reader.release(partial(_is_of, step))
        self._step = last
        return groups[-1]


def _is_of(step: int, group: RolloutGroup) -> bool:
    return group.step == step


def _items(step: int) -> list[WorkItem]:
    sampling = SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=10**6)
    return [
        WorkItem(
            group_id=(group_id := f"{step}-{slot:06d}"),
            kind="train",
            step=step,
            min_policy_version=0,
            prompt_ids=[1] * PROMPT_TOKENS,
            group_size=GROUP_SIZE,
            seeds=[sample_seed(0, group_id, sample) for sample in range(GROUP_SIZE)],
            sampling=sampling,
            checker="mcq",
            answer="A",
        )
        for slot in range(GROUPS_PER_STEP)
    ]


def bare(redis: Any, run: str, groups: int, item: bytes, group: bytes) -> None:
    """The bytes of so many groups through two streams, `BARE_AT_ONCE` to a round trip."""
    work, finished, cursor = f"bare:{run}:work", f"bare:{run}:groups", "0"
    redis.xgroup_create(work, "rollout", "0", mkstream=True)
    for _ in range(groups // BARE_AT_ONCE):
        with redis.pipeline(transaction=False) as pipeline:
            for _ in range(BARE_AT_ONCE):
                pipeline.xadd(work, {"data": item})
            pipeline.xreadgroup("rollout", "bare", {work: ">"}, count=BARE_AT_ONCE)
            ids = [entry_id for entry_id, _ in pipeline.execute()[-1][0][1]]
            for entry_id in ids:
                pipeline.xadd(finished, {"data": group})
                pipeline.xack(work, "rollout", entry_id)
                pipeline.xdel(work, entry_id)
            pipeline.xread({finished: cursor}, count=BARE_AT_ONCE)
            read = [entry_id for entry_id, _ in pipeline.execute()[-1][0][1]]
            cursor = read[-1]
            redis.xdel(finished, *read)
    redis.delete(work, finished)


def measure(url: str, tokens: int, num_replicas: int, steps: int, rounds: int) -> dict[str, Any]:
    """Groups a second of both, a round of each in turn; CPU milliseconds and Redis commands of a group."""
    redis, run = connect(url), f"control-{uuid.uuid4().hex}"
    trainer, groups = Trainer(redis, run), steps * GROUPS_PER_STEP
    found: dict[str, list[dict[str, float]]] = {"retort": [], "bare": []}
    with replicas(url, run, num_replicas, tokens) as replica_cpu_s:
        group = trainer.train(1)
        item = _items(1)[0]
        for _ in range(rounds):
            found["retort"].append(_timed(redis, groups, lambda: trainer.train(steps)))
            same_bytes = partial(bare, redis, run, groups, item.to_bytes(), group.to_bytes())
            found["bare"].append(_timed(redis, groups, same_bytes))
    redis.delete(*Keys(run).of_functions())
    both = {name: {key: statistics.median(one[key] for one in ones) for key in ones[0]} for name, ones in found.items()}
    # With what they spend on waiting while the turn is the other's.
    both["retort"]["replicas_cpu_ms"] = sum(replica_cpu_s) / (rounds * groups + GROUPS_PER_STEP) * 1e3
    ratios = [ours["groups_per_s"] / its["groups_per_s"] for ours, its in zip(*found.values(), strict=True)]
    return {
        "completion_tokens": tokens,
        "kilobytes_of_a_group": len(group.to_bytes()) / 1e3,
        **both,
        "retort_beside_bare": statistics.median(ratios),
    }


def _timed(redis: Any, groups: int, act: Callable[[], object]) -> dict[str, float]:
    before, cpu, start = redis.info(), time.process_time(), time.perf_counter()
    act()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    after = redis.info()
    server_cpu = sum(after[name] - before[name] for name in ("used_cpu_user", "used_cpu_sys"))
    return {
        "groups_per_s": groups / wall,
        "client_cpu_ms": cpu / groups * 1e3,
        "redis_cpu_ms": server_cpu / groups * 1e3,
        "redis_commands": (after["total_commands_processed"] - before["total_commands_processed"]) / groups,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.control_plane", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 1024], help="of a completion; 8 to a group")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help=f"of {GROUPS_PER_STEP} groups, in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one object instead of lines")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with own_valkey() as url:
        sizes = [measure(url, tokens, args.replicas, args.steps, args.rounds) for tokens in args.tokens]
    found = {"load_before": load, "cores": os.cpu_count(), "replicas": args.replicas, "sizes": sizes}
    print(json.dumps(found) if args.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
