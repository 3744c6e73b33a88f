"""`python -m retort.cli.health SERVICE WHERE`: does a service get on with its work? What containers ask themselves.

    reward HOST:PORT      it serves (gRPC health)
    rollout HOST:PORT     its engine is loaded and runs (/healthz)
    trainer RUN_FILE      it has said something new within the run's timeouts.stall_s

Exit code 0: yes. 1: no, and the reason is printed.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from urllib.error import URLError
from urllib.request import urlopen

from retort.config import ConfigError, load_config

ANSWER_WITHIN_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m retort.cli.health", description=__doc__)
    parser.add_argument("service", choices=CHECKS)
    parser.add_argument("where", metavar="WHERE")
    args = parser.parse_args(argv)
    problem = CHECKS[args.service](args.where)
    print(problem or "healthy")
    return 1 if problem else 0


def reward_problem(address: str) -> str:
    """Why the reward service at `address` does not serve; empty if it does."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    request = health_pb2.HealthCheckRequest(service="reward.v1.RewardService")
    try:
        with grpc.insecure_channel(address) as channel:
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=ANSWER_WITHIN_S)
    except grpc.RpcError as error:
        return f"the reward service at {address} does not answer: {error.code().name}"
    if reply.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    return f"the reward service at {address} is {status}"


def rollout_problem(address: str) -> str:
    """Why the rollout server at `address` is not alive; empty if it is."""
    try:
        with urlopen(f"http://{address}/healthz", timeout=ANSWER_WITHIN_S):
            return ""
    except (URLError, OSError) as error:
        return f"the rollout server at {address} does not answer: {error}"


def trainer_problem(run_file: str) -> str:
    """Why the trainer of the run is thought to hang; empty if it gets on."""
    from retort.queues import IMPATIENT, RunView, connect

    try:
        config = load_config(run_file)
        redis = connect(config.redis.url or os.environ.get("REDIS_URL", ""), IMPATIENT)
    except ConfigError as error:
        return str(error)
    progress = RunView(redis, config.key_prefix).progress()
    if not progress:
        return "the trainer has not said anything yet"
    age_s = time.time() - float(progress["updated"])
    if age_s <= config.timeouts.stall_s:
        return ""
    return (
        f"the trainer has said nothing new for {age_s:.0f} s (timeouts.stall_s = {config.timeouts.stall_s:.0f}); "
        f"last: {progress['phase']}, step {progress['step']}, waiting for {progress['waiting_for'] or 'nothing'}"
    )


CHECKS = {"reward": reward_problem, "rollout": rollout_problem, "trainer": trainer_problem}

if __name__ == "__main__":
    sys.exit(main())
