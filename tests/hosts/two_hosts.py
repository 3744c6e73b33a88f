"""Two hosts as two network namespaces joined by a veth pair. Their addresses exist inside them alone."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[2]
HEAD_ADDRESS, NODE_ADDRESS = "10.77.0.1", "10.77.0.2"
DEVICE = "veth0"
"""What each of them calls its end of the cable."""
CLOSING_S = 20.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


class TwoHosts:
    """Use as a context: inside, `head` and `node` reach each other unless the cable is out."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        name = uuid.uuid4().hex[:8]
        self.head, self.node = f"retort-head-{name}", f"retort-node-{name}"
        self._logs = logs
        self._environment = {**os.environ, **environment, "GLOO_SOCKET_IFNAME": DEVICE, "PYTHONPATH": str(ROOT)}
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        for namespace in (self.head, self.node):
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip("link", "add", DEVICE, "netns", self.head, "type", "veth", "peer", "name", DEVICE, "netns", self.node)
        for namespace, address in ((self.head, HEAD_ADDRESS), (self.node, NODE_ADDRESS)):
            ip("-n", namespace, "address", "add", f"{address}/24", "dev", DEVICE)
            ip("-n", namespace, "link", "set", DEVICE, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(CLOSING_S)
        for namespace in (self.head, self.node):
            ip("netns", "delete", namespace)

    def pull_the_cable(self) -> None:
        ip("-n", self.node, "link", "set", DEVICE, "down")

    def plug_it_in(self) -> None:
        ip("-n", self.node, "link", "set", DEVICE, "up")

    def start(self, namespace: str, name: str, *command: str, again: bool = False) -> subprocess.Popen[bytes]:
        """Run a command there. `again`: until it ends well, as its supervisor would."""
        words = ["ip", "netns", "exec", namespace]
        words += ["sh", "-c", 'until "$@"; do sleep 1; done', name] if again else []
        with (self._logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*words, *command],
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def python(self, namespace: str, name: str, *words: str, again: bool = False) -> subprocess.Popen[bytes]:
        return self.start(namespace, name, sys.executable, *words, again=again)

    def ask_redis(self, *words: str) -> str:
        """What valkey's own client is told on the head."""
        program = "import sys, redis; print(redis.Redis(host=sys.argv[1], protocol=2).execute_command(*sys.argv[2:]))"
        command = ["ip", "netns", "exec", self.head, sys.executable, "-c", program, HEAD_ADDRESS, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
