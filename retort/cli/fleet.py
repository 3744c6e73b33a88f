"""`retort fleet`: the rollout replicas of a run, and how one of them is made to leave or to start anew."""

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

from redis import Redis

from retort.cli.preflight import redis_url
from retort.cli.process_table import open_redis
from retort.cli.status import newest_run, read_status, redis_of
from retort.config import ConfigError, load_config
from retort.queues import Member, RunView, evict, request_drain

ABOUT = """\
list    who is there, what it serves, how much it has in hand, when it last finished a group (the default)
drain   the replica takes no more work, finishes what it has in hand and leaves for good
evict   the trainer goes on without the replica; it ends, is started again by its supervisor, and joins anew
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ABOUT
    parser.add_argument("action", nargs="?", choices=("list", "drain", "evict"), default="list")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a replica, as the list names it")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--run-dir", type=Path, metavar="DIR", help="directory of the run; default: the newest in runs/")
    where.add_argument(
        "--config", type=Path, metavar="FILE", help="run file of a run that no `retort run` on this machine started"
    )


def main(args: argparse.Namespace) -> int:
    if (args.action == "list") != (args.name is None):
        raise ConfigError(
            f"`retort fleet {args.action}` " + ("takes no NAME" if args.name else "needs the NAME of one")
        )
    redis, run = _run_of(args.config) if args.config else _newest(args.run_dir)
    members = RunView(redis, run).members()
    if args.action == "list":
        print("\n".join(fleet_lines(members.values(), now=time.time())))
        return 0
    if args.name not in members:
        raise ConfigError(f"no replica {args.name!r} in this run; there are: {', '.join(sorted(members)) or 'none'}")
    member = members[args.name]
    if args.action == "drain":
        request_drain(redis, run, member)
        print(f"{member.name} is asked to leave; first it finishes the {member.groups_in_hand} groups in its hands")
    else:
        evict(redis, run, member)
        print(f"{member.name} is evicted; its work goes to others, and its supervisor starts it again")
    return 0


def fleet_lines(members: Iterable[Member], now: float) -> list[str]:
    """A line for every replica under a headline. `now` is the time in seconds since 1970."""
    rows = [("replica", "state", "version", "in hand", "finished", "tokens", "last finished", "heard of", "address")]
    for member in sorted(members, key=lambda member: member.name):
        version = "-" if member.policy_version is None else str(member.policy_version)
        last = f"{now - member.last_finished:.0f} s ago" if member.last_finished else "-"
        counts = (str(member.groups_in_hand), str(member.groups_finished), f"{member.tokens_generated:,}")
        heard = f"{now - member.updated:.0f} s ago"
        rows.append((member.name, member.state, version, *counts, last, heard, member.http_url))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _newest(directory: Path | None) -> tuple[Redis, str]:
    """The Redis of a run that `retort run` started, and the prefix of its keys."""
    directory = directory or newest_run(Path("runs"))
    status = read_status(directory)
    if status["exit_code"] is not None:
        raise ConfigError(f"{directory}: the run has ended (exit code {status['exit_code']}), its replicas are gone.")
    return redis_of(directory, status)


def _run_of(file: Path) -> tuple[Redis, str]:
    config = load_config(file)
    if not redis_url(config):
        raise ConfigError(f"{file} names no Redis (redis.url), and REDIS_URL is not set.")
    return open_redis(redis_url(config)), config.key_prefix
