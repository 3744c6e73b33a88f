"""Somebody on the same machine who tries the ports of a run: without its secrets, and with those of one role."""

from collections.abc import Mapping

import grpc
import httpx
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError

from retort.cli.status import redis_of
from retort.proto.reward.v1 import reward_pb2, reward_pb2_grpc
from retort.queues import RunView
from tests.e2e.launched_run import LaunchedRun

ROLES = ("trainer", "rollout", "operator")
COMMANDS = ("EVAL return 1 0", "CONFIG GET *", "CONFIG SET maxmemory 1", "FLUSHALL", "GET other:key", "ACL LIST")


def answers_to_an_outsider(run: LaunchedRun) -> Mapping[str, str]:
    """What was tried at the run's open ports -> what it was answered; to be called while the run goes on."""
    address = {p["name"]: next(iter(p["addresses"].values()), "") for p in run.status()["processes"]}
    answers = {"redis, no password": _asked(f"redis://{address['redis']}/0", "PING")}
    for role in ROLES:
        url = (run.directory / "secrets" / role / "redis-url").read_text().strip()
        answers |= {f"redis, {role}, {command}": _asked(url, command) for command in COMMANDS}
        answers[f"redis, {role}, PING"] = _asked(url, "PING")
    answers["reward"] = _score(address["reward"], "")
    answers["reward, wrong token"] = _score(address["reward"], "0" * 48)
    answers["reward, token"] = _score(
        address["reward"], (run.directory / "secrets/rollout/reward-token").read_text().strip()
    )
    [member] = RunView(*redis_of(run.directory, run.status())).members().values()
    answers["control"] = str(httpx.post(f"{member.control_url}/weights/prepare").status_code)
    return answers


def _asked(url: str, command: str) -> str:
    with Redis.from_url(url, protocol=2) as redis:
        try:
            return str(redis.execute_command(*command.split()))
        except (AuthenticationError, NoPermissionError) as error:
            return type(error).__name__


def _score(address: str, token: str) -> str:
    item = reward_pb2.Item(id="0", checker="mcq", completion="<answer>A</answer>", answer="A")
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address) as channel:
        try:
            reply = reward_pb2_grpc.RewardServiceStub(channel).Score(
                reward_pb2.ScoreRequest(items=[item]), timeout=60, metadata=metadata
            )
        except grpc.RpcError as error:
            return str(error.code().name)
    return f"reward {reply.results[0].reward.value}"
