"""The stack of docker-compose.yml under podman, seen from outside: its containers, and its run directory."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.launched_run import SETTINGS, LaunchedRun

ROOT = Path(__file__).parents[2]
SERVICES = ("redis", "reward", "rollout", "trainer")


class Stack:
    """One project of podman-compose. `settings`: keys of the run file, besides those of the end-to-end tests."""

    def __init__(self, project: str, scratch: Path, settings: dict[str, object]) -> None:
        self._project = project
        self._overlay = scratch / "overlay.json"
        environment = {
            "RETORT_" + key.upper().replace(".", "__"): str(value) for key, value in (SETTINGS | settings).items()
        }
        services = {name: {"environment": environment} for name in ("reward", "rollout", "trainer")}
        self._overlay.write_text(json.dumps({"services": services}))

    def compose(self, *arguments: str) -> None:
        """podman-compose, with both files."""
        files = ["--file", str(ROOT / "docker-compose.yml"), "--file", str(self._overlay)]
        options = ["--podman-build-args=--network host", "--project-name", self._project, *files]
        subprocess.run(["podman-compose", *options, *arguments], cwd=ROOT, check=True)

    def remove(self) -> None:
        """Leave no container, volume or network. `down` alone forgets the replicas that `--scale` added."""
        ids = podman("ps", "--all", "--quiet", "--filter", f"label=io.podman.compose.project={self._project}").split()
        podman("rm", "--force", "--depend", "--time", "5", *ids)
        self.compose("down", "--volumes")

    def containers(self, service: str) -> list[dict[str, Any]]:
        """What podman knows of the containers of a service, in the order in which they were made."""
        labels = (f"io.podman.compose.project={self._project}", f"com.docker.compose.service={service}")
        filters = [word for label in labels for word in ("--filter", f"label={label}")]
        names = podman("ps", "--all", "--quiet", *filters).split()
        found: list[dict[str, Any]] = json.loads(podman("inspect", *names)) if names else []
        return sorted(found, key=lambda container: container["Created"])

    def is_healthy(self, service: str) -> bool:
        """The service's own health check, run now."""
        check = ["podman", "healthcheck", "run", self.containers(service)[0]["Id"]]
        return subprocess.run(check, check=False, capture_output=True).returncode == 0

    def address(self, service: str) -> str:
        """The IP address of its first container, which this machine reaches."""
        [network] = self.containers(service)[0]["NetworkSettings"]["Networks"].values()
        return str(network["IPAddress"])

    def run(self) -> LaunchedRun:
        """The run directory, which lives in a named volume."""
        volume = podman("volume", "inspect", "--format", "{{.Mountpoint}}", f"{self._project}_runs")
        return LaunchedRun(Path(volume.strip()) / "tiny-cpu")

    def kill(self, service: str) -> None:
        """SIGKILL the first container of a service from outside, and wait until it was started again."""
        container = self.containers(service)[0]
        before = container["State"]["Pid"]
        os.kill(before, signal.SIGKILL)
        self.until(lambda: self._pid(container["Id"]) not in (0, before), f"a restart of {service}")

    def _pid(self, container: str) -> int:
        return int(podman("inspect", "--format", "{{.State.Pid}}", container))

    def exit_code(self) -> int | None:
        """The trainer's, None while it runs or is about to be started again."""
        [trainer] = self.containers("trainer")
        state = trainer["State"]
        return None if state["Status"] != "exited" or state["ExitCode"] == 137 else int(state["ExitCode"])

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 300.0) -> None:
        """Wait. The error names what for and shows the last lines of every container."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self.exit_code()  # before the condition, which the end may make true
            if condition():
                return
            assert ended is None, f"the trainer ended with {ended} before {what}\n{self.tails()}"
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}\n{self.tails()}"
            time.sleep(0.5)

    def until_step(self, step: int) -> None:
        self.until(lambda: self.run().last_step() >= step, f"step {step} in metrics.jsonl")

    def tails(self) -> str:
        """The last lines of every container."""
        containers = [container for service in SERVICES for container in self.containers(service)]
        return "\n".join(f"--- {one['Name']}\n{podman('logs', '--tail', '20', one['Id'])}" for one in containers)


def podman(*arguments: str) -> str:
    """Output of a podman command, both streams; an error shows it."""
    done = subprocess.run(["podman", *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"podman {' '.join(arguments)}: {done.stderr}"
    return done.stdout + (done.stderr if arguments[0] == "logs" else "")
