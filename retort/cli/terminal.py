"""The terminal while something is drawn in place: a key that is echoed there would leave a torn line behind."""

import os
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO


@contextmanager
def silent_control_keys(output: IO[str]) -> Iterator[None]:
    """Ctrl-C is still delivered, but `^C` is not shown. Does nothing where `output` is not our own terminal."""
    if not _in_foreground(output):
        yield
        return
    before = termios.tcgetattr(output)
    silent = [*before[:3], before[3] & ~termios.ECHOCTL, *before[4:]]
    termios.tcsetattr(output, termios.TCSANOW, silent)
    try:
        yield
    finally:
        if _in_foreground(output):
            termios.tcsetattr(output, termios.TCSANOW, before)


def _in_foreground(output: IO[str]) -> bool:
    """A job in the background is stopped by the system when it changes the terminal."""
    try:
        return os.tcgetpgrp(output.fileno()) == os.getpgrp()
    except OSError:  # not a file, or not the terminal that controls us
        return False
