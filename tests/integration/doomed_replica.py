"""A replica in a process of its own that sends itself a signal in one phase of a weight sync."""

import multiprocessing
import signal
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from tests.integration.queue_run import Run
from tests.integration.torch_replica import TorchReplica

READY_WITHIN_S = 60.0


class DoomedReplica(TorchReplica):
    """Stops or ends when the call of its phase arrives."""

    def __init__(self, run: Run, phase: str, number: signal.Signals) -> None:
        super().__init__(run, "doomed")
        self._phase = phase
        self._signal = number

    async def _asgi(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["path"] == f"/weights/{self._phase}":
            # To this thread, which therefore does nothing more; another might take its time to stop the process.
            signal.pthread_kill(threading.get_ident(), self._signal)
        await super()._asgi(scope, receive, send)


def _live(url: str, run_id: str, phase: str, number: signal.Signals, ready: Connection) -> None:
    with DoomedReplica(Run(url, run_id), phase, number):
        ready.send(True)
        threading.Event().wait()


@contextmanager
def a_doomed_replica(run: Run, phase: str, number: signal.Signals) -> Iterator[None]:
    """Inside, it is a member of the run, named `doomed`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_live, args=(run.url, run.run_id, phase, number, theirs), daemon=True)
    process.start()
    try:
        assert ours.poll(READY_WITHIN_S), f"no replica within {READY_WITHIN_S:g} s"
        yield
    finally:
        process.kill()
        process.join(10)
