"""Which trainer may write the files of a run: the one with the highest epoch in the file `epoch` beside them.

Redis refuses the calls of a trainer that was replaced, but Redis may forget who was the newest. This file does not, and
its lock makes "I am the newest" and the write that follows one step: a trainer that was frozen between the two would
otherwise wake up and write over its successor's files.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retort.disk import writing
from retort.queues import Fenced
from services.trainer.admission import StalledError

LOCK_POLL_S = 0.05


class Fence:
    """One trainer's right to write. Rank 0 only."""

    def __init__(self, file: Path, patience_s: float) -> None:
        """`patience_s` bounds the wait for another trainer that is writing at this moment."""
        self._file = file
        self._patience_s = patience_s
        self.epoch = 0

    def take_over(self, highest_elsewhere: int) -> int:
        """Become the newest: one more than any epoch before, here or elsewhere. Returns the epoch, which is durable."""
        with writing(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as file, writing(self._file):
            self.epoch = max(_epoch_in(file), highest_elsewhere) + 1
            # One write over the old digits, which are never more: a crash leaves the old epoch or the new one.
            os.pwrite(file, str(self.epoch).encode(), 0)
            os.fsync(file)
        return self.epoch

    @contextmanager
    def held(self) -> Iterator[None]:
        """While inside, nobody takes over. Raises Fenced if somebody has."""
        with self._locked() as file:
            if (newest := _epoch_in(file)) > self.epoch:
                raise Fenced(self.epoch, newest)
            yield

    @contextmanager
    def _locked(self) -> Iterator[int]:
        deadline = time.monotonic() + self._patience_s
        file = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while not _lock(file):
                if time.monotonic() > deadline:
                    raise StalledError(
                        f"another trainer has held the lock on {self._file} for {self._patience_s:.0f} s: it is "
                        "frozen in the middle of a write. End that process, then start again."
                    )
                time.sleep(LOCK_POLL_S)
            yield file
        finally:
            os.close(file)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _epoch_in(file: int) -> int:
    return int(os.pread(file, 20, 0) or 0)
