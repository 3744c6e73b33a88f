"""Whether a process that was written down is still there. A process id alone may have gone to another one since."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]  # it has no types


def identity(pid: int | None) -> dict[str, Any]:
    """What identifies a process: host, process id, and start in ticks since the boot, None if it is gone."""
    return {"host": socket.gethostname(), "pid": pid, "started": _started(pid)}


def is_gone(identity: Mapping[str, Any]) -> bool:
    """Whether that very process has ended. False where nobody can tell: it runs on another host."""
    if identity["host"] != socket.gethostname():
        return False
    started = _started(identity["pid"])
    return started is None or started != identity["started"]


def condition(identity: Mapping[str, Any], *, alone: bool = False) -> Literal["running", "frozen", "gone", "unknown"]:
    """What the process table says of that very process; frozen: it was stopped by a signal.

    Unless it is asked for `alone`, it is frozen too if anything below it is.
    """
    if identity["host"] != socket.gethostname():
        return "unknown"
    if is_gone(identity):
        return "gone"
    try:
        process = psutil.Process(identity["pid"])
        below = [] if alone else process.children(recursive=True)
        states = [process.status() for process in (process, *below)]
    except psutil.NoSuchProcess:
        return "unknown"  # one of them has just ended
    return "frozen" if psutil.STATUS_STOPPED in states else "running"


def _started(pid: int | None) -> int | None:
    """Field 22 of /proc/PID/stat. Unlike a time of day it stays the same when the clock is set."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
