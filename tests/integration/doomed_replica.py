"""A replica in a process of its own to which something happens in one phase of a weight sync."""

import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from torch import Tensor

from tests.integration.queue_run import Run
from tests.integration.torch_replica import TorchReplica

READY_WITHIN_S = 60.0
PHASES = ["prepare", "transfer", "broadcast", "probe", "commit"]
"""The calls, and the time in `transfer` when the first of the weights have arrived."""


class Fates:
    """What can happen to it."""

    @staticmethod
    def stopped() -> None:
        # To this thread, which therefore does nothing more; another might take its time to stop the process.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    @staticmethod
    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def cut_off() -> None:
        """In a network namespace of its own: nothing that is sent arrives, and nobody is told."""
        subprocess.run(["ip", "link", "set", "veth0", "down"], check=True)


class DoomedReplica(TorchReplica):
    """Meets its fate when the call of its phase arrives, or in `broadcast` the second bucket."""

    def __init__(self, run: Run, phase: str, fate: Callable[[], None], host: str = "127.0.0.1") -> None:
        super().__init__(run, "doomed", corrupt=self._wire, host=host)
        self._phase = phase
        self._fate = fate

    async def _asgi(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["path"] == f"/weights/{self._phase}":
            self._fate()
        await super()._asgi(scope, receive, send)

    def _wire(self, bucket: int, _: Tensor) -> None:
        if self._phase == "broadcast" and bucket == 1:
            self._fate()


def _live(url: str, run_id: str, phase: str, fate: str, ready: Connection) -> None:
    with DoomedReplica(Run(url, run_id), phase, getattr(Fates, fate)):
        ready.send(True)
        threading.Event().wait()


@contextmanager
def a_doomed_replica(run: Run, phase: str, fate: str) -> Iterator[None]:
    """Inside, it is a member of the run, named `doomed`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_live, args=(run.url, run.run_id, phase, fate, theirs), daemon=True)
    process.start()
    try:
        assert ours.poll(READY_WITHIN_S), f"no replica within {READY_WITHIN_S:g} s"
        yield
    finally:
        process.kill()
        process.join(10)
