"""`retort env`: what a bug report needs and nobody remembers to say. Shows no secrets, imports no heavy package."""

import argparse
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from retort.cli.version import PACKAGES, installed_version

PREFIXES = ("RETORT_", "REDIS_", "CUDA_", "NCCL_", "GLOO_", "OMP_", "VLLM_", "HF_", "TORCH_", "SLURM_", "LOG_")
SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|KEY", re.IGNORECASE)
PASSWORD_IN_URL = re.compile(r"://\S*@")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def main(args: argparse.Namespace) -> int:
    for name, value in facts():
        print(f"{name:18}{value}")
    return 0


def facts() -> Iterator[tuple[str, str]]:
    """(name, value)"""
    for package in PACKAGES:
        yield package, installed_version(package)
    yield "commit", _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    yield "python", f"{platform.python_version()} {platform.python_implementation()}"
    yield "system", f"{platform.platform()} {platform.machine()}"
    yield "cpu", f"{_first('/proc/cpuinfo', 'model name')}, {len(os.sched_getaffinity(0))} usable"
    yield "memory", f"{_first('/proc/meminfo', 'MemTotal')}, {_first('/proc/meminfo', 'MemAvailable')} available"
    yield "/dev/shm", f"{shutil.disk_usage('/dev/shm').total // 2**20} MiB"
    yield "open files", f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
    yield "locked memory", f"{resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]} (-1: unlimited)"
    yield "container", "yes" if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() else "no"
    gpus = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    for gpu in gpus.splitlines():
        yield "gpu", gpu
    yield from settings(os.environ)


def settings(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The variables that matter to a run, without what is secret in them."""
    for name, value in sorted(environment.items()):
        if name.startswith(PREFIXES):
            yield name, " …" if SECRET.search(name) else " " + PASSWORD_IN_URL.sub("://…@", value)


def _first(file: str, key: str) -> str:
    """The value of the first `key : value` in a file of /proc."""
    lines = (line.partition(":") for line in Path(file).read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "-")


def _output(*command: str) -> str:
    """What a command prints; "-" where it is not there, fails or hangs."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "-"
    return ran.stdout.strip()
