"""A reward service as a process of its own, for tests and benchmarks."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]

USER_CHECKERS = '''
import time
from services.reward.checkers import Checker, Limits, Reward, Unscorable

def reward(value):
    return Reward(value=value, correct=True, parsed="", format_ok=True, rule="", explanation="")

class Raises(Checker):
    name, version, description, quick = "raises", "1", "", True
    def check(self, completion, answer, options):
        raise ValueError("boom")

class NotANumber(Checker):
    name, version, description, quick = "not_a_number", "1", "", True
    def check(self, completion, answer, options):
        return reward(float("nan"))

class Waits(Checker):
    """Returns when somebody has written to, and closed, the pipe that the answer names."""
    name, version, description, quick = "waits", "1", "", True
    def check(self, completion, answer, options):
        with open(answer) as pipe:
            pipe.read()
        return reward(0.25)

class Does(Checker):
    """Runs the completion within its worker process: what a checker with a hole would do."""
    name, version, description, limits = "does", "1", "", Limits(seconds=1.0, memory_mib=64)
    def check(self, completion, answer, options):
        exec(completion, {})
        return reward(1.0)

class CannotPrepare(Does):
    name = "cannot_prepare"
    def prepare(self):
        raise ValueError("not today")

class HangsInPrepare(Does):
    name = "hangs_in_prepare"
    def prepare(self):
        time.sleep(3600)
'''


@dataclass
class Service:
    process: subprocess.Popen[str]
    address: str
    http: str
    """Base of its URLs; empty if it serves no HTTP."""
    log: IO[str]

    def read_log(self) -> str:
        self.log.seek(0)
        return self.log.read()

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@contextmanager
def reward_service(*arguments: str, python_path: str = "", files: int = 0) -> Iterator[Service]:
    """A reward service that is ready, killed at the end if it still runs. `files`: how many it may open, if not 0."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "services.reward", *arguments]
        if files:
            command = ["prlimit", f"--nofile={files}", *command]
        environment = os.environ | {"PYTHONPATH": python_path}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log, text=True)
        with process:
            try:
                fields = _wait_until_ready(process, log)
                scheme = "https" if "--tls-cert" in arguments else "http"
                yield Service(
                    process, fields["address"], f"{scheme}://{fields['http']}" if "http" in fields else "", log
                )
            finally:
                process.kill()


def _wait_until_ready(process: subprocess.Popen[str], log: IO[str]) -> dict[str, str]:
    give_up = time.monotonic() + 100
    while time.monotonic() < give_up and process.poll() is None:
        log.seek(0)
        for line in log:
            if " ready " in line and line.endswith("\n"):
                return dict(word.split("=", 1) for word in line.split() if "=" in word)
        time.sleep(0.02)
    log.seek(0)
    raise AssertionError(f"the service is not ready: {log.read()}")


def install_user_checkers(folder: Path) -> str:
    """A package with checkers of its own, as pip would have installed it; the folder is its import path."""
    (folder / "user_checkers.py").write_text(USER_CHECKERS)
    metadata = folder / "user_checkers-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: user-checkers\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[retort.checkers]\n"
        "raises = user_checkers:Raises\n"
        "not_a_number = user_checkers:NotANumber\n"
        "waits = user_checkers:Waits\n"
        "does = user_checkers:Does\n"
        "cannot_prepare = user_checkers:CannotPrepare\n"
        "hangs_in_prepare = user_checkers:HangsInPrepare\n"
    )
    return str(folder)


def children(pid: int) -> list[int]:
    """Processes below this one, at any depth."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return sorted(below - {pid})
