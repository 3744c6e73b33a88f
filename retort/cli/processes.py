"""Processes of a run: started in their own sessions, restarted when they die, all gone in the end.

Nothing outlives the launcher. A program is killed by the kernel when the launcher dies (`die_with_parent`), what a
program started is tied to it in the same way by its own code, and a process whose parent died comes to the launcher
(the "subreaper" of everything below it), which ends and reaps it.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil  # type: ignore[import-untyped]  # it has no types

from retort.telemetry import LAUNCHER_PID, die_with_parent

_PR_SET_CHILD_SUBREAPER = 36
_ORPHAN_GRACE_S = 10.0
"""Helpers such as multiprocessing's resource tracker clean up after their parent's death and end by themselves."""
_KILL_DEADLINE_S = 10.0
"""A process that SIGKILL does not end within this time hangs in the kernel; the error then names its command."""


@dataclass(frozen=True)
class Program:
    """What to run, and when its end is final."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """On top of the launcher's own."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """What it listens on: protocol -> host:port."""
    final_exit_codes: frozenset[int] = frozenset()
    """Exit codes with which it has said its last word. With any other it is started again."""
    leaving_exit_codes: frozenset[int] = frozenset()
    """Exit codes with which it has left for good while the run goes on."""
    is_needed: bool = True
    """Whether the run ends when it cannot be kept running."""
    may_start: Callable[[], bool] = lambda: True
    """Asked before every start; a program waits while what it needs first, such as Redis, is not there."""


@dataclass(frozen=True)
class RestartPolicy:
    """How often, and how soon, a program that died is started again."""

    max_restarts: int
    window_s: float = 600.0
    first_delay_s: float = 0.5
    longest_delay_s: float = 30.0

    def delay(self, deaths: Sequence[float], now: float) -> float | None:
        """Seconds to wait before the next start, given the times of all deaths so far; None: give up."""
        recent = sum(now - death < self.window_s for death in deaths)
        if recent > self.max_restarts:
            return None
        return float(min(self.first_delay_s * 2 ** (recent - 1), self.longest_delay_s))


@dataclass(frozen=True)
class Ending:
    """Why a run cannot go on: a program's last word, or one death too many."""

    program: Program
    exit_code: int
    """Negative: killed by that signal."""
    gave_up: bool

    @property
    def cause(self) -> str:
        return f"{self.program.name} {describe_exit(self.exit_code)}"


@dataclass
class Child:
    """A program and its present process, if it has one."""

    program: Program
    process: subprocess.Popen[bytes] | None = None
    deaths: list[float] = field(default_factory=list)
    start_at: float | None = None
    """When to start it (monotonic), while that is due."""
    starts: int = 0

    @property
    def restarts(self) -> int:
        return max(self.starts - 1, 0)

    @property
    def state(self) -> str:
        return "running" if self.process else "exited" if self.start_at is None else "starting"


class Supervisor:
    """Starts programs and keeps them running; on exit from its `with` block no process is left."""

    def __init__(self, policy: RestartPolicy, announce: Callable[[str], None]) -> None:
        self._policy = policy
        self._announce = announce
        self.children: dict[str, Child] = {}

    def __enter__(self) -> Self:
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(self.children, grace_s=0.0)

    def add(self, program: Program) -> None:
        """Take charge of a program; the next `poll` that may starts it."""
        self.children[program.name] = Child(program, start_at=time.monotonic())

    def poll(self) -> Ending | None:
        """Reap what died, start what is due. Returns the first ending, if there is one."""
        now = time.monotonic()
        for child in self.children.values():
            code = child.process.poll() if child.process else None
            if code is not None:
                ending = self._after_death(child, code, now)
                if ending:
                    return ending
            elif child.start_at is not None and now >= child.start_at and child.program.may_start():
                child.process, child.start_at = _spawn(child.program), None
                child.starts += 1
        self._reap_adopted()
        return None

    def stop(self, names: Iterable[str], grace_s: float) -> None:
        """SIGTERM, after `grace_s` SIGKILL, for the named programs and everything below them. Returns when gone."""
        children = [self.children.pop(name) for name in list(names)]
        processes = [psutil.Process(c.process.pid) for c in children if c.process and c.process.poll() is None]
        below = [process for parent in processes for process in parent.children(recursive=True)]
        if grace_s:
            for process in processes:
                _send(process, signal.SIGTERM)
            psutil.wait_procs(processes, timeout=grace_s)
        for process in processes:
            _send(process, signal.SIGKILL)
        for child in children:
            if child.process:
                child.process.wait(timeout=_KILL_DEADLINE_S)
        _end([*below, *self._orphans()])

    def _after_death(self, child: Child, code: int, now: float) -> Ending | None:
        child.process = None
        child.deaths.append(now)
        _end(self._orphans())
        if code in child.program.leaving_exit_codes:
            self._announce(f"{child.program.name} has left")
            return None
        delay = None if code in child.program.final_exit_codes else self._policy.delay(child.deaths, now)
        if delay is None and not child.program.is_needed:
            how = describe_exit(code)
            self._announce(f"{child.program.name} {how}; the run goes on without it (log {child.program.log})")
            return None
        if delay is None:
            return Ending(child.program, code, gave_up=code not in child.program.final_exit_codes)
        child.start_at = now + delay
        self._announce(
            f"{child.program.name} {describe_exit(code)}; starting it again in {delay:.1f} s "
            f"(restart {len(child.deaths)}, log {child.program.log})"
        )
        return None

    def _reap_adopted(self) -> None:
        """Take note of the end of processes that came here after their parent's death, so that none stays a zombie."""
        ours = {child.process.pid for child in self.children.values() if child.process}
        options = os.WEXITED | os.WNOHANG
        while ours:  # with no child at all, waitid is an error
            ended = os.waitid(os.P_ALL, 0, options | os.WNOWAIT)
            if ended is None or ended.si_pid in ours:  # the next poll asks ours
                return
            os.waitid(os.P_PID, ended.si_pid, options)

    def _orphans(self) -> list[psutil.Process]:
        """Processes below this one that belong to no living program: their parent died and they came here."""
        ours = {child.process.pid for child in self.children.values() if child.process}
        adopted = [process for process in psutil.Process().children() if process.pid not in ours]
        return adopted + [process for parent in adopted for process in parent.children(recursive=True)]


def describe_exit(code: int) -> str:
    """`ended with exit code 3`, `was killed by SIGKILL`."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a log that say something."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        return list(deque((line.rstrip() for line in lines if line.strip()), maxlen=count))


def _spawn(program: Program) -> subprocess.Popen[bytes]:
    """Start in a session of its own, so that the terminal's Ctrl-C reaches only the launcher."""
    launcher = os.getpid()
    with program.log.open("ab") as log:
        return subprocess.Popen(
            list(program.command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, LAUNCHER_PID: str(launcher), **program.environment},
            start_new_session=True,
            # Safe here: the launcher has no other thread that could hold a lock at the fork.
            preexec_fn=lambda: die_with_parent(launcher),  # noqa: PLW1509  # one thread
        )


def _end(processes: Sequence[psutil.Process]) -> None:
    """Let processes end by themselves for a moment, kill the rest, and reap them."""
    _, alive = psutil.wait_procs(processes, timeout=_ORPHAN_GRACE_S)
    for process in alive:
        _send(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=_ORPHAN_GRACE_S)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return  # it ended before the signal came
