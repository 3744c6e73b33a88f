"""One simulated run, from an empty Redis to its last step."""

import asyncio
import time
import uuid
from typing import Any

import torch.distributed as dist

from retort.queues import connect, connect_async
from retort.queues.protocol import Keys
from simulation.fleet import Fleet, replica_name
from simulation.setup import Measured, Setup
from simulation.trainer import SimulatedTrainer
from simulation.virtual_time import TRAINER, VirtualTimeLoop


def simulate(setup: Setup, num_steps: int, redis_url: str) -> Measured:
    """Run so many steps and say what they took."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(_simulate(setup, num_steps, redis_url))
    finally:
        dist.destroy_process_group()


async def _simulate(setup: Setup, num_steps: int, redis_url: str) -> Measured:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    run, num_replicas = f"simulated-{uuid.uuid4().hex}", setup.config.rollout.replicas
    with loop.held(TRAINER):
        redis, trainers_redis = await connect_async(redis_url), connect(redis_url)
        fleet = Fleet(setup, run, redis, loop)
        trainer = SimulatedTrainer(trainers_redis, fleet, num_steps)
        before: Any = trainers_redis.info()
        began, cpu = time.perf_counter(), time.thread_time()
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(fleet.keep(replica_name(number))) for number in range(num_replicas)]
            background.append(tasks.create_task(fleet.kill()))
            await asyncio.to_thread(trainer.run)
            for task in background:
                task.cancel()
        after: Any = trainers_redis.info()
        trainers_redis.delete(*Keys(run).of_functions())
        await redis.aclose()
    groups = len(trainer.trained)
    assert groups == len(set(trainer.trained)), "a group was trained twice"
    grew = {name: after[name] - before[name] for name in before if isinstance(before[name], int | float)}
    return Measured(
        step_s=trainer.step_s,
        groups=groups,
        tokens=trainer.tokens,
        redis_calls=grew["total_commands_processed"] / groups,
        redis_bytes=(grew["total_net_input_bytes"] + grew["total_net_output_bytes"]) / groups,
        redis_cpu_s=(grew["used_cpu_user"] + grew["used_cpu_sys"]) / num_steps,
        trainer_cpu_s=trainer.cpu_s / num_steps,
        replica_cpu_s=(time.thread_time() - cpu) / num_steps / num_replicas,
        real_s=time.perf_counter() - began,
    )
