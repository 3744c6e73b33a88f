"""`retort status [RUN_DIR]`: what a run is doing, from the status.json that its launcher keeps current."""

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retort.cli.invocation import command
from retort.cli.liveness import is_gone
from retort.cli.panel import clock
from retort.config import ConfigError, load_config
from retort.disk import writing
from retort.metrics_file import MetricsFile

if TYPE_CHECKING:
    from redis import Redis

    from retort.config import RunConfig
    from retort.queues import Member

STATUS_FILE = "status.json"
DIED = "died"
"""The phase of a run whose launcher is gone without a word."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", nargs="?", type=Path, help="directory of the run; default: the newest under runs/")
    parser.add_argument("--json", action="store_true", help="print status.json with the replicas as Redis knows them")


def main(args: argparse.Namespace) -> int:
    runs = [] if args.run_dir else all_runs(Path("runs"))
    directory = args.run_dir or runs[0]
    status = read_status(directory)
    replicas = read_replicas(directory, status)
    if args.json:
        print(json.dumps({**status, "replicas": replicas}, indent=2))
    else:
        lines = status_lines(directory, status, replicas, now=time.time())
        print("\n".join([*lines, *result_lines(directory, status), *(_in_short(run) for run in runs[1:])]))
    return 0


def write_status(directory: Path, status: Mapping[str, Any]) -> None:
    """Replace status.json; a reader sees the old one or the new one, never a part."""
    draft = directory / f".{STATUS_FILE}.part"
    with writing(directory / STATUS_FILE):
        draft.write_text(json.dumps(status), encoding="utf-8")
        os.replace(draft, directory / STATUS_FILE)


def all_runs(runs: Path) -> list[Path]:
    """The run directories; first the one whose status was written last. Raises ConfigError when there is none."""
    files = sorted(runs.glob(f"*/{STATUS_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    if not files:
        start = command("run", "CONFIG")
        raise ConfigError(f"no run under {runs.resolve()}. Start one with `{start}`, or name its directory.")
    return [file.parent for file in files]


def newest_run(runs: Path) -> Path:
    """The run directory whose status was written last."""
    return all_runs(runs)[0]


def read_status(directory: Path) -> dict[str, Any]:
    try:
        status: dict[str, Any] = json.loads((directory / STATUS_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        config_file = directory / "config.toml"
        if config_file.exists() and not (directory / STATUS_FILE).exists():
            begin = command("run", config_file, "--resume")
            # A launcher that is alive writes its status in a moment.
            raise ConfigError(
                f"{directory}: nothing runs there: its launcher ended before it had started anything, or is just "
                f"starting. If it has ended: `{begin}`"
            ) from None
        what = "no such directory" if not directory.exists() else f"no run there: {STATUS_FILE}: {error.strerror}"
        raise ConfigError(f"{directory}: {what}. `{command('status')}` lists the runs in runs/.") from None
    if status["exit_code"] is None and "launcher" in status and is_gone(status["launcher"]):
        status["phase"] = DIED
        status["processes"] = [
            {**process, "state": "gone" if is_gone(process) else process["state"]} for process in status["processes"]
        ]
    return status


def read_replicas(directory: Path, status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rollout replicas as Redis knows them; none when the run has ended or its Redis cannot be reached."""
    if status["exit_code"] is not None or status["phase"] == DIED:
        return []
    from redis.exceptions import RedisError

    from retort.queues import RunView

    try:
        return replicas_shown(RunView(*redis_of(directory, status)).members())
    except (RedisError, ConfigError, ValueError):
        return []


def redis_of(directory: Path, status: Mapping[str, Any]) -> "tuple[Redis, str]":
    """The Redis of a run, and the prefix of the run's keys in it."""
    from retort.cli.process_table import open_redis

    config = load_config(directory / "config.toml")
    return open_redis(url_of(directory, config, status)), config.key_prefix


def url_of(directory: Path, config: "RunConfig", status: Mapping[str, Any]) -> str:
    """Of the Redis that the run's launcher started, else of the one that its file names; empty without both."""
    from retort.cli.credentials import operator_url
    from retort.cli.preflight import redis_url
    from retort.cli.process_table import SECRETS

    is_embedded = any("redis" in process["addresses"] for process in status["processes"])
    return operator_url(directory / SECRETS) if is_embedded else redis_url(config)


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
    ended = status["exit_code"] is not None or status["phase"] == DIED
    lines = [
        f"run       {status['run']} in {directory}",
        f"phase     {_phase(status, age)}",
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


def result_lines(directory: Path, status: Mapping[str, Any]) -> list[str]:
    """Of a run that ended: what it reached, how long it took, and where to go from here."""
    if status["exit_code"] is None and status["phase"] != DIED:
        return []
    lines = []
    samples = load_config(directory / "config.toml", env={}).validation.samples
    metrics = MetricsFile(directory / "metrics.jsonl")
    metrics.read()
    if accuracy := metrics.accuracy(samples):
        (first, before), (last, after) = accuracy[0], accuracy[-1]
        lines.append(
            f"result    avg@{samples} {before:.3f} at version {first} -> {after:.3f} at version {last} "
            f"({after - before:+.3f})"
        )
    if "elapsed_s" in status:
        lines.append(f"took      {clock(status['elapsed_s'])} since it was last started")
    if (report := directory / "report.html").is_file():
        lines.append(f"report    {report}")
    if status["exit_code"] != 0:
        lines.append(f"resume    {command('run', directory / 'config.toml', '--resume')}")
    return lines


def _phase(status: Mapping[str, Any], age_s: float) -> str:
    if status["phase"] == DIED:
        return f"{DIED}: its launcher is gone; last seen {clock(age_s)} ago"
    ended = status["exit_code"] is not None
    return f"{status['phase']}" + (f" (exit code {status['exit_code']})" if ended else "")


def _in_short(directory: Path) -> str:
    status = read_status(directory)
    return f"other run {directory}: {status['phase']}, step {status['step']} of {status['steps']}"
