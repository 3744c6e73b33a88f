"""Ctrl-C, SIGTERM and the death of a child as events that a loop waits for, so that none cuts it off half-way."""

import contextlib
import select
import signal
import socket
from types import FrameType, TracebackType
from typing import Self


class Interrupts:
    """While entered, SIGINT and SIGTERM only count up and SIGCHLD only wakes `wait`. Main thread only."""

    count: int = 0
    """How often the user asked to stop."""

    def __enter__(self) -> Self:
        self._wakeup, self._raised = socket.socketpair()
        self._wakeup.setblocking(False)
        self._raised.setblocking(False)
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
        self._previous = {number: signal.signal(number, self._note) for number in signals}
        self._previous_fd = signal.set_wakeup_fd(self._raised.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._wakeup.close()
        self._raised.close()

    def wait(self, timeout_s: float) -> None:
        """Return after a signal, or after the timeout."""
        select.select([self._wakeup], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):
            self._wakeup.recv(4096)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self.count += 1
