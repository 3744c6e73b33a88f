"""`retort dead ls|show|replay|drop [RUN_DIR] [ID]`: the work of a run that was set aside, and what to do with it."""

import argparse
import json
import time
from pathlib import Path

import msgspec
from redis import Redis
from redis.exceptions import RedisError

from retort.cli.process_table import open_redis
from retort.cli.status import newest_run, read_status, url_of
from retort.config import ConfigError, load_config
from retort.queues import DeadWork, RedisFull, RunView, drop_dead, replay_dead

EPILOG = """\
Work that failed `rollout.max_deliveries` times, or that could not be read, is set aside here with its bytes.
A run that is resumed asks anew for every group that it lacks; `replay` does so for one group without that.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("action", choices=["ls", "show", "replay", "drop"])
    parser.add_argument("run_dir", nargs="?", type=Path, help="directory of the run; default: the newest under runs/")
    parser.add_argument("id", nargs="?", default="", help="of the entry, as `ls` prints it")


def main(args: argparse.Namespace) -> int:
    directory = args.run_dir or newest_run(Path("runs"))
    config = load_config(directory / "config.toml")
    url = url_of(directory, config, read_status(directory))
    if not url:
        raise ConfigError(f"{directory}: the run has ended, and its Redis with it. Resume it, or start its Redis.")
    redis = open_redis(url)
    try:
        return _act(redis, config.key_prefix, args.action, args.id)
    except (RedisError, RedisFull) as error:
        raise ConfigError(f"the Redis of {directory} cannot do it: {error}") from None


def _act(redis: Redis, run: str, action: str, entry_id: str) -> int:
    view = RunView(redis, run)
    work = view.dead()
    if action == "ls":
        print("\n".join(map(_line, work)) or "nothing was set aside")
        return 0
    chosen = next((one for one in work if one.entry_id == entry_id), None)
    if chosen is None:
        known = ", ".join(one.entry_id for one in work) or "none"
        raise ConfigError(f"no entry {entry_id or '(id missing)'} in the dead-letter stream; there are: {known}")
    if action == "show":
        print(_line(chosen))
        for attempt in chosen.attempts:
            print(
                f"  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(attempt.at))}  {attempt.replica}: {attempt.why}"
            )
        print(_content(view.dead_bytes(entry_id)))
    elif action == "drop":
        drop_dead(redis, run, entry_id)
        print(f"dropped {entry_id}")
    elif chosen.cause == "corrupt":
        raise ConfigError(f"{entry_id} is damaged and cannot be replayed; the trainer asks for its group by itself.")
    else:
        again = replay_dead(redis, run, entry_id)
        print(f"group {chosen.group_id} is {'in its queue again' if again else 'awaited or there already; dropped'}")
    return 0


def _line(work: DeadWork) -> str:
    return f"{work.entry_id}  {work.kind}  {work.group_id}  {work.cause} under epoch {work.epoch}: {work.reason}"


def _content(data: bytes) -> str:
    try:
        return json.dumps(msgspec.msgpack.decode(data), indent=1)
    except (msgspec.DecodeError, TypeError):
        return f"{len(data)} bytes that no message is made of: {data[:200].hex()}"
