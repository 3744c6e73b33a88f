"""Starts the reward service: `python -m services.reward --help`."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points

from retort.config import ConfigError, RewardConfig, load_config
from retort.telemetry import start_logging
from services.reward.checkers import Checker
from services.reward.discovery import GROUP, load_checkers
from services.reward.server import serve

EPILOG = """\
examples:
  python -m services.reward --port 50051                  on its own, for any client
  python -m services.reward --config runs/a/config.toml   as a part of a run

It logs "ready address=HOST:PORT" once it takes calls. SIGTERM or Ctrl-C drains: health
turns NOT_SERVING, calls in flight finish, exit code 0. Exit code 2: bad configuration or
a port in use. The API is proto/reward/v1/reward.proto.
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    start_logging("reward")
    try:
        config = load_config(arguments.config).reward if arguments.config else RewardConfig()
        host = config.host if arguments.host is None else arguments.host
        port = config.port if arguments.port is None else arguments.port
        asyncio.run(_serve_until_signalled(load_checkers(entry_points(group=GROUP)), host, port))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


async def _serve_until_signalled(checkers: Mapping[str, Checker], host: str, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(checkers, host, port, stop)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m services.reward",
        description="Scores completions over gRPC: one reward, or one reason why there is none, for each.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="run file with a [reward] table")
    parser.add_argument("--host", help="address to listen on, instead of the run file's (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="gRPC port, instead of the run file's (default 0: any free one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
