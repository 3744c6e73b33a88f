"""`retort status [RUN_DIR]`: what a run is doing, from the status.json that its launcher keeps current."""

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retort.config import ConfigError

if TYPE_CHECKING:
    from redis import Redis

    from retort.config import RunConfig
    from retort.queues import Member, RunView

STATUS_FILE = "status.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", nargs="?", type=Path, help="directory of the run; default: the newest under runs/")
    parser.add_argument("--json", action="store_true", help="print status.json with the replicas as Redis knows them")


def main(args: argparse.Namespace) -> int:
    directory = args.run_dir or newest_run(Path("runs"))
    status = read_status(directory)
    replicas = read_replicas(directory, status)
    if args.json:
        print(json.dumps({**status, "replicas": replicas}, indent=2))
    else:
        print("\n".join(status_lines(directory, status, replicas, now=time.time())))
    return 0


def write_status(directory: Path, status: Mapping[str, Any]) -> None:
    """Replace status.json; a reader sees the old one or the new one, never a part."""
    draft = directory / f".{STATUS_FILE}.part"
    draft.write_text(json.dumps(status), encoding="utf-8")
    os.replace(draft, directory / STATUS_FILE)


def newest_run(runs: Path) -> Path:
    """The run directory whose status was written last."""
    files = sorted(runs.glob(f"*/{STATUS_FILE}"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(f"no run under {runs.resolve()}. Start one with `retort run CONFIG`, or name its directory.")
    return files[-1].parent


def read_status(directory: Path) -> dict[str, Any]:
    try:
        status: dict[str, Any] = json.loads((directory / STATUS_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{directory}: no run there: {STATUS_FILE}: {error.strerror}.") from None
    return status


def read_replicas(directory: Path, status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rollout replicas as Redis knows them; none when the run has ended or its Redis cannot be reached."""
    if status["exit_code"] is not None:
        return []
    from redis.exceptions import RedisError

    from retort.queues import RunView

    try:
        return replicas_shown(RunView(*redis_of(directory, status)).members())
    except (RedisError, ValueError):
        return []


def open_view(config: "RunConfig", status: Mapping[str, Any]) -> "RunView":
    """A look into the Redis of a run."""
    from retort.queues import RunView

    return RunView(_open_redis(config, status), config.key_prefix)


def redis_of(directory: Path, status: Mapping[str, Any]) -> "tuple[Redis, str]":
    """The Redis of a run, and the prefix of the run's keys in it."""
    from retort.config import load_config

    config = load_config(directory / "config.toml")
    return _open_redis(config, status), config.key_prefix


def _open_redis(config: "RunConfig", status: Mapping[str, Any]) -> "Redis":
    """The one that the run's launcher started, else the one that its file names."""
    from retort.cli.preflight import redis_url
    from retort.cli.process_table import open_redis

    return open_redis(embedded_redis(status) or redis_url(config))


def embedded_redis(status: Mapping[str, Any]) -> str:
    """Address of the Redis that the launcher started; empty if it started none."""
    embedded = [p["addresses"]["redis"] for p in status["processes"] if "redis" in p["addresses"]]
    return f"redis://{embedded[0]}/0" if embedded else ""


def replicas_shown(members: "Mapping[str, Member]") -> list[dict[str, Any]]:
    """What is shown of each replica."""
    return [
        {
            "name": name,
            "state": member.state,
            "policy_version": member.policy_version,
            "updated": member.updated,
        }
        for name, member in sorted(members.items())
    ]


def status_lines(directory: Path, status: Mapping[str, Any], replicas: list[dict[str, Any]], now: float) -> list[str]:
    """The status as text. `now` is the time in seconds since 1970."""
    age = now - status["updated"]
    ended = status["exit_code"] is not None
    lines = [
        f"run       {status['run']} in {directory}",
        f"phase     {status['phase']}" + (f" (exit code {status['exit_code']})" if ended else ""),
        f"step      {status['step']} of {status['steps']}, policy version {status['policy_version']}",
    ]
    if status["waiting_for"] and not ended:
        lines.append(f"waiting   trainer waits for {status['waiting_for']} ({now - status['since']:.0f} s)")
    for process in status["processes"]:
        addresses = " ".join(f"{key}={value}" for key, value in process["addresses"].items())
        restarts = f", restarts: {process['restarts']}" if process["restarts"] else ""
        lines.append(
            f"process   {process['name']}: {process['state']}, pid {process['pid']}{restarts} {addresses}".rstrip()
        )
    for replica in replicas:
        lines.append(f"replica   {replica['name']}: {replica['state']}, policy version {replica['policy_version']}")
    if not ended and age > 10:
        lines.append(f"warning   written {age:.0f} s ago: the launcher is gone or hangs")
    return lines
