"""`retort serve reward`: one service on its own, for whoever needs only that one."""

import argparse
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("service", choices=["reward"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the service, for example --config F")


def main(args: argparse.Namespace) -> int:
    # The service replaces this process: signals, exit code and output are its own.
    os.execv(sys.executable, [sys.executable, "-m", f"services.{args.service}", *args.arguments])
