"""`retort run` as a user starts it, seen from outside: its files, its processes, what it leaves."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from services.trainer.admission import data_indices

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "tiny-cpu.toml"
RETORT_RUN = (sys.executable, "-m", "retort.cli", "run")
GROUPS_PER_STEP = 4
SETTINGS = {
    "trainer.groups_per_step": GROUPS_PER_STEP,
    "trainer.groups_per_update": 2,
    "validation.every": 100,  # before the first step and after the last
    "validation.max_questions": 4,
    "validation.samples": 4,
    # On a busy machine a rollout server needs minutes to come back.
    "timeouts.startup_s": 600,
    "timeouts.stall_s": 600,
}
SHARED_MEMORY = Path("/dev/shm")


class LaunchedRun:
    """One run directory and the launcher that works on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output = directory.parent / f"{directory.name}.output"
        self.addresses: set[str] = set()
        self.shared_memory: set[Path] = set()
        self._looked_at = 0.0
        self.answers: Mapping[str, str] = {}
        """What an outsider was answered, if one tried."""

    def start(self, *arguments: str, **settings: object) -> None:
        """`retort run`; keys of the run file are written with two underscores for the dot."""
        overrides = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
        options = [] if "--resume" in arguments else [f"--set={key}={value}" for key, value in overrides.items()]
        environment = {key: value for key, value in os.environ.items() if key != "REDIS_URL"}
        with self.output.open("ab") as output:
            self.launcher = subprocess.Popen(
                [*RETORT_RUN, str(CONFIG), "--run-dir", str(self.directory), *arguments, *options],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def finish(self, timeout_s: float = 600.0) -> int:
        """Wait for the end of the run and return its exit code."""
        self.until(lambda: self.launcher.poll() is not None, "the end of the run", timeout_s, goes_on=False)
        return self.launcher.returncode

    def until(
        self, condition: Callable[[], bool], what: str, timeout_s: float = 600.0, *, goes_on: bool = True
    ) -> None:
        """Wait; the error names what for and shows the logs. `goes_on`: the launcher must not end meanwhile."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert not goes_on or self.launcher.poll() is None, f"the run ended before {what}\n{self.tails()}"
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}\n{self.tails()}"
            self.note_what_must_go()
            time.sleep(0.1)

    def until_step(self, step: int) -> None:
        self.until(lambda: self.last_step() >= step, f"step {step} in metrics.jsonl")

    def signal(self, number: signal.Signals) -> None:
        self.launcher.send_signal(number)

    def kill(self, service: str) -> None:
        """SIGKILL one service, and wait until the launcher has started it again and a step was made since."""
        [process] = [process for process in self.status()["processes"] if process["name"] == service]
        os.kill(process["pid"], signal.SIGKILL)
        self.until(lambda: self.restarts()[service] == process["restarts"] + 1, f"a restart of {service}")
        self.until_step(self.last_step() + 1)

    def status(self) -> dict[str, Any]:
        return json.loads((self.directory / "status.json").read_text())

    def restarts(self) -> dict[str, int]:
        return {process["name"]: process["restarts"] for process in self.status()["processes"]}

    def metrics(self) -> list[dict[str, Any]]:
        file = self.directory / "metrics.jsonl"
        return read_lines(file) if file.exists() else []

    def last_step(self) -> int:
        return max((line["step"] for line in self.metrics()), default=-1)

    def groups(self) -> list[dict[str, Any]]:
        """Everything that was trained on, in the order of the files."""
        return [line for file in sorted((self.directory / "rollouts").glob("*")) for line in read_lines(file)]

    def admitted(self, steps: int) -> Counter[str]:
        """The groups that these steps ask for."""
        own = self.directory / "task" / "train.jsonl"
        questions = own if own.exists() else ROOT / "data" / "periodic_table" / "train.jsonl"
        num_questions = len(questions.read_text().splitlines())
        plan = [
            data_indices(step, num_questions=num_questions, groups_per_step=GROUPS_PER_STEP, seed=0)
            for step in range(1, steps + 1)
        ]
        return Counter(f"{epoch}-{index:06d}" for epoch, indices in plan for index in indices)

    def processes(self) -> list[psutil.Process]:
        """Every living process of the run but the launcher."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def leftovers(self, timeout_s: float = 10.0) -> dict[str, list[str]]:
        """What is left of the run after a moment: processes, ports where somebody listens, shared memory."""
        deadline = time.monotonic() + timeout_s
        while any((left := self._left()).values()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def tails(self) -> str:
        """The last lines of everything that the run has written."""
        files = [self.output, *sorted(self.directory.glob("logs/*.log")), self.directory / "status.json"]
        return "\n".join(f"--- {file.name}\n{tail(file)}" for file in files if file.exists())

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.pid == self.launcher.pid or process.status() == psutil.STATUS_ZOMBIE:
                return False
            directory = str(self.directory)
            # Valkey writes its title over its environment, but it works in the run directory.
            return process.environ().get("RETORT_RUN_DIR") == directory or process.cwd().startswith(directory)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def _left(self) -> dict[str, list[str]]:
        return {
            "processes": [str(process) for process in self.processes()],
            "ports": [address for address in sorted(self.addresses) if is_listening(address)],
            "shared memory": [str(path) for path in sorted(self.shared_memory) if path.exists()],
        }

    def note_what_must_go(self) -> None:
        """Note, once a second, what will have to be gone in the end."""
        if time.monotonic() < self._looked_at + 1 or not (self.directory / "status.json").exists():
            return
        self._looked_at = time.monotonic()
        processes = self.status()["processes"]
        self.addresses |= {address for process in processes for address in process["addresses"].values()}
        for process in self.processes():
            self.shared_memory |= mapped_shared_memory(process)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file; a last one without its end is still being written."""
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def tail(file: Path, count: int = 25) -> str:
    return "\n".join(line[:300] for line in file.read_text(errors="replace").splitlines()[-count:])


def is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


def mapped_shared_memory(process: psutil.Process) -> set[Path]:
    """Files of /dev/shm that a process uses."""
    try:
        paths = {Path(mapped.path) for mapped in process.memory_maps()}
    except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
        return set()
    return {path for path in paths if path.parent == SHARED_MEMORY}
