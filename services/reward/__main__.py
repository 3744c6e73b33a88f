"""Starts the reward service: `python -m services.reward --help`."""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points

from retort.config import ConfigError, RewardConfig, load_config
from retort.telemetry import start_logging
from retort.unpickling import refuse_unpickling
from services.reward.checkers import Checker
from services.reward.discovery import GROUP, load_checkers
from services.reward.security import Security, read_security
from services.reward.serving import serve

SIGNALS = (signal.SIGTERM, signal.SIGINT)
HIGHEST_PORT = 65535

EPILOG = """\
examples:
  retort serve reward --grpc-port 50051 --http-port 8081      on its own, for any client
  retort serve reward --config runs/a/config.toml             as a part of a run
  retort serve reward --host 0.0.0.0 --grpc-port 50051 \\
      --tls-cert server.pem --tls-key server.key --token-file tokens
  retort serve reward --grpc-port 50051 --shadow mcq=mcq_lenient

It logs "ready address=HOST:PORT http=HOST:PORT" once it takes calls. SIGTERM or Ctrl-C drains:
health turns NOT_SERVING, calls in flight finish, exit code 0. Exit code 2: bad configuration
or a port in use. The API is docs/reward-api.md.
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    for number in SIGNALS:
        # Until the service takes them, because so far there is nothing to drain.
        signal.signal(number, lambda *_: os._exit(0))
    start_logging("reward")
    refuse_unpickling()
    try:
        config = load_config(arguments.config).reward if arguments.config else RewardConfig()
        host = config.host if arguments.host is None else arguments.host
        port = config.port if arguments.port is None else arguments.port
        checkers = load_checkers(entry_points(group=GROUP))
        security = read_security(
            token_file=arguments.token_file,
            tls_certificate=arguments.tls_cert,
            tls_key=arguments.tls_key,
            tls_client_ca=arguments.tls_client_ca,
            hosts=[host],
            allow_plaintext=arguments.allow_plaintext,
        )
        shadows = _shadows(arguments.shadow, checkers)
        asyncio.run(_serve_until_signalled(checkers, host, port, arguments.http_port, security, shadows))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _shadows(pairs: Sequence[str], checkers: Mapping[str, Checker]) -> Mapping[str, str]:
    shadows: dict[str, str] = {}
    for pair in pairs:
        name, _, shadow = pair.partition("=")
        if name not in checkers or shadow not in checkers:
            raise ConfigError(f"--shadow {pair}: give two checkers as NAME=SHADOW; known: {', '.join(checkers)}.")
        shadows[name] = shadow
    return shadows


async def _serve_until_signalled(
    checkers: Mapping[str, Checker],
    host: str,
    grpc_port: int,
    http_port: int | None,
    security: Security,
    shadows: Mapping[str, str],
) -> None:
    stop = asyncio.Event()
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(checkers, host, grpc_port, http_port, security, shadows, stop)


def _port(text: str) -> int:
    # With more than HIGHEST_PORT, gRPC would listen on the lowest 16 bits of it.
    if not text.isdecimal() or int(text) > HIGHEST_PORT:
        raise argparse.ArgumentTypeError(f"{text} is no port; give 0 (any free one) to {HIGHEST_PORT}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retort serve reward",
        description="Scores completions over gRPC and HTTP: one reward, or one reason why there is none, for each.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="run file with a [reward] table")
    parser.add_argument("--host", help="address to listen on, instead of the run file's (default 127.0.0.1)")
    parser.add_argument(
        "--grpc-port", "--port", dest="port", type=_port, metavar="PORT",
        help="gRPC port, instead of the run file's (default 0: any free one)",
    )  # fmt: skip
    parser.add_argument("--http-port", type=_port, metavar="PORT", help="also serve HTTP/JSON there (0: any free one)")
    parser.add_argument(
        "--token-file", default="", metavar="FILE", help="callers need one of its lines as bearer token"
    )
    parser.add_argument("--tls-cert", default="", metavar="FILE", help="certificate chain of this service, PEM")
    parser.add_argument("--tls-key", default="", metavar="FILE", help="its private key, PEM")
    parser.add_argument("--tls-client-ca", default="", metavar="FILE", help="callers need a certificate signed by it")
    parser.add_argument(
        "--allow-plaintext", action="store_true", help="serve without TLS on an address that others can reach"
    )
    parser.add_argument(
        "--shadow", action="append", default=[], metavar="NAME=SHADOW",
        help="score what checker NAME scores with SHADOW as well, and report where they disagree",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
