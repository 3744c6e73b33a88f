"""Runs Python that nobody has read, in a process of its own, confined before its first line."""

import contextlib
import os
import select
import signal
import sys
from dataclasses import dataclass
from types import CodeType

from retort.telemetry import die_with_parent
from services.reward.checkers import Limits
from services.reward.isolation.sandbox import LARGEST_FILE_BYTES, confine, limit_cpu

REPORT = 3
"""File descriptor to which the child writes PASSED, or what was raised."""
PASSED = b"passed"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended."""

    how: str
    """`passed` (ran to its end), `raised`, `ended_early`, `time_limit` or `crashed`."""
    detail: str
    stdout: bytes
    """At most LARGEST_FILE_BYTES; a program that prints more crashes."""


def run_program(sources: list[str], stdin: bytes, limits: Limits, may_exit: bool) -> Ended:
    """Execute the sources one after the other in one namespace, as `__main__`.

    `may_exit` says whether sys.exit() is a good end. Returns within `limits.seconds` and the time to kill it.
    """
    with contextlib.ExitStack() as files:
        inputs, output, report = (_memory_file(files, name) for name in ("stdin", "stdout", "report"))
        os.write(inputs, stdin)
        os.lseek(inputs, 0, os.SEEK_SET)
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _become_program(parent, sources, (inputs, output, report), limits, may_exit)
        status = _wait(child, limits.seconds)
        return _ended(status, _content(report), _content(output), limits)


def _memory_file(files: contextlib.ExitStack, name: str) -> int:
    opened = os.memfd_create(name)
    files.callback(os.close, opened)
    return opened


def _content(opened: int) -> bytes:
    return os.pread(opened, LARGEST_FILE_BYTES, 0)


def _wait(child: int, seconds: float) -> int | None:
    """Exit status of the child, or None if it had to be killed."""
    handle = os.pidfd_open(child)
    try:
        ended, _, _ = select.select([handle], [], [], seconds)
        if not ended:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(handle)
    return status if ended else None


def _ended(status: int | None, report: bytes, stdout: bytes, limits: Limits) -> Ended:
    if status is None:
        return Ended("time_limit", f"ran for more than {limits.seconds:g} s", stdout)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        limit = {signal.SIGXCPU: " (CPU time)", signal.SIGXFSZ: f" (printed over {LARGEST_FILE_BYTES} bytes)"}
        name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
        return Ended("crashed", f"was ended by {name}{limit.get(signal.Signals(number), '')}", stdout)
    if report == PASSED:
        return Ended("passed", "", stdout)
    if report:
        return Ended("raised", report.decode(errors="replace"), stdout)
    return Ended("ended_early", f"ended with exit code {os.WEXITSTATUS(status)} before its end", stdout)


def _become_program(
    parent: int, sources: list[str], files: tuple[int, int, int], limits: Limits, may_exit: bool
) -> None:
    """Never returns."""
    try:
        die_with_parent(parent)
        inputs, output, report = (os.dup2(opened, 100 + index) for index, opened in enumerate(files))
        for opened, place in ((inputs, 0), (output, 1), (report, REPORT)):
            os.dup2(opened, place)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.closerange(REPORT + 1, 4096)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115  # for its life
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        limit_cpu(limits.seconds)
        confine(limits)
        os.write(REPORT, _execute(sources, may_exit))
    finally:
        os._exit(0)


def _execute(sources: list[str], may_exit: bool) -> bytes:
    namespace: dict[str, object] = {"__name__": "__main__"}
    try:
        for index, source in enumerate(sources):
            code: CodeType = compile(source, f"<part {index}>", "exec")
            exec(code, namespace)
    except SystemExit as exit_:
        if not may_exit or exit_.code not in (None, 0):
            return f"SystemExit: {exit_.code!r}".encode(errors="replace")[:500]
    except BaseException as error:  # noqa: BLE001  # foreign code
        # Any end but the last line's is a failure, KeyboardInterrupt and what the program invents included.
        return _describe(error)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    return PASSED


def _describe(error: BaseException) -> bytes:
    name = type(error).__name__
    try:
        return f"{name}: {error}".encode(errors="replace")[:500]
    except BaseException:  # noqa: BLE001  # foreign code
        # Its __str__ is foreign code as well.
        return name.encode(errors="replace")
