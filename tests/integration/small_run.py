"""A run of small real processes under the real launcher: `small_run.py RUN_FILE [BEHAVIOUR]`.

Valkey, supervision, progress and metrics are the product's own; what stands in for the services is below. They join
the run as the real ones do and train nothing. BEHAVIOUR says what one of them does wrong.
"""

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

from retort.config import load_config

STEP_S = 0.1


def launch_small_run(run_file: Path, behaviour: str) -> int:
    from retort.cli.launch import launch
    from retort.cli.process_table import plan_programs

    def plan(config, config_file):
        url, programs = plan_programs(config, config_file)
        small = [
            program
            if program.name in ("redis", *config.trackers)
            else dataclasses.replace(
                program, command=[sys.executable, __file__, str(config_file), behaviour, program.name]
            )
            for program in programs
        ]
        return url, small

    config = load_config(run_file)
    config = config.model_copy(update={"run_id": f"{config.name}-{uuid.uuid4().hex[:6]}"})
    return launch(config, f"retort run {run_file} --resume", plan)


def reward(config) -> None:
    with socket.create_server(("127.0.0.1", config.reward.port)) as server:
        while True:
            server.accept()[0].close()


async def rollout(config, name: str, behaviour: str) -> None:
    from retort.queues import Member, RolloutQueue, connect_async

    # A process below, as vLLM's engine is one.
    tie = "" if behaviour == "loose" else "from retort.telemetry import die_with_parent; die_with_parent();"
    subprocess.Popen([sys.executable, "-c", f"{tie} import time; time.sleep(600)"])
    queue = RolloutQueue(await connect_async(config.redis.url), config.key_prefix, name, 20.0, 4)
    incarnation = uuid.uuid4().hex
    while True:
        wanted = await queue.announce(
            Member(
                name=name,
                pid=os.getpid(),
                host="127.0.0.1",
                control_url="",
                http_url="",
                policy_version=0,
                state="serving",
                incarnation=incarnation,
                groups_in_hand=0,
                tokens_generated=0,
                waiting_for="",
                updated=time.time(),
            )
        )
        if wanted == "drain":
            await queue.leave()
            return
        await asyncio.sleep(STEP_S)


def trainer(config, behaviour: str) -> int:
    from retort.queues import TrainerQueue, connect

    queue = TrainerQueue(connect(config.redis.url), config.key_prefix, epoch=1)
    metrics = config.directory / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    if behaviour == "dies":
        print("the tokenizer has no tokens", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGKILL)
    for step in range(done, config.trainer.steps + 1):
        now = time.time()
        queue.set_progress(
            phase="train",
            step=step,
            steps=config.trainer.steps,
            policy_version=step,
            waiting_for="",
            since=now,
            updated=now,
        )
        if behaviour == "diverges" and step == 2:
            print("diverged: 8 updates in a row had a non-finite gradient norm", file=sys.stderr)
            return 5
        if behaviour == "hangs" and step == 2:
            queue.set_progress(waiting_for="groups from rollout-0", updated=time.time())
            signal.pause()
        time.sleep(STEP_S)
        line = {
            "step": step,
            "time": time.time(),
            "critic/score/mean": 0.5,
            "policy_version": step,
            "timing_s/step": STEP_S,
        }
        if step in (0, config.trainer.steps):
            line["val-core/periodic_table/acc/mean@16"] = 0.25 + step / 100
        with metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if queue.stop_requested() and behaviour != "deaf":
            return 130
    return 0


def main() -> int:
    run_file, behaviour, *name = sys.argv[1:]
    if not name:
        return launch_small_run(Path(run_file), behaviour)
    config = load_config(run_file)
    if name[0] == "reward":
        reward(config)
    elif name[0] == "trainer":
        return trainer(config, behaviour)
    else:
        asyncio.run(rollout(config, name[0], behaviour))
    return 0


if __name__ == "__main__":
    sys.exit(main())
