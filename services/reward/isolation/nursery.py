"""The process from which workers are forked: `python -m services.reward.isolation.nursery`, started by `pool`.

Its standard input is a socket. A message on it is the name of a checker and carries the worker's end of a new
socket; the reply is the worker's process id and carries its pidfd. A message that carries nothing asks to prepare
the checker; the reply to that is 0.
"""

import os
import signal
import socket
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points

from retort.telemetry import die_with_parent
from services.reward.checkers import Checker
from services.reward.discovery import GROUP, load_checkers
from services.reward.isolation.worker import work

LONGEST_NAME_BYTES = 1024


def main() -> None:
    parent = os.getppid()
    die_with_parent(parent)
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries dead workers; the service holds their pidfds
    raise_workers(load_checkers(entry_points(group=GROUP)), control)


def raise_workers(checkers: Mapping[str, Checker], control: socket.socket) -> None:
    """Do what the messages ask, until the service is gone."""
    prepared: set[str] = set()
    while True:
        name, handles, _, _ = socket.recv_fds(control, LONGEST_NAME_BYTES, 1)
        if not name:
            return
        checker = checkers[name.decode()]
        if checker.name not in prepared:
            _prepare(checker)
            prepared.add(checker.name)
        if handles:
            _fork(checker, control, handles[0])
        else:
            control.send(b"0")


def _prepare(checker: Checker) -> None:
    try:
        checker.prepare()
    except ImportError:
        pass  # What is not installed is told by the worker, as the verdict of each item.
    except BaseException:  # noqa: BLE001  # foreign code
        # The log says it, and whether `check` can do without is seen in its verdicts.
        sys.excepthook(*sys.exc_info())


def _fork(checker: Checker, control: socket.socket, channel: int) -> None:
    nursery = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become_worker(nursery, checker, control, channel)
    os.close(channel)
    handle = os.pidfd_open(pid)
    socket.send_fds(control, [str(pid).encode()], [handle])
    os.close(handle)


def _become_worker(nursery: int, checker: Checker, control: socket.socket, channel: int) -> None:
    """Never returns."""
    try:
        die_with_parent(nursery)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        work(checker, socket.socket(fileno=channel))
    except BaseException:  # noqa: BLE001  # see below
        # Nothing may unwind into the nursery's loop. The service sees the socket close, and says so.
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
