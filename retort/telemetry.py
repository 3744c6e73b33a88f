"""How every process starts: its log lines, and its tie to the process that started it.

A log line is an event with fields, on stderr:

    2026-03-01T12:00:00.123 INFO rollout-0 weights_committed version=3 seconds=0.045
"""

import ctypes
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

LAUNCHER_PID = "RETORT_LAUNCHER_PID"
"""Environment variable in which `retort run` leaves its process id for everything below it."""

_PR_SET_PDEATHSIG = 1
_logger = logging.getLogger("retort")


def start_logging(service: str, level: int = logging.INFO) -> None:
    """Send every log record of this process to stderr, one line each; `service` is the name of the process."""
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(_EventLine(service))
    logging.basicConfig(handlers=[lines], level=logging.WARNING, force=True)
    _logger.setLevel(level)


def log_event(event: str, level: int = logging.INFO, **fields: object) -> None:
    """Log one event, for example `log_event("step_done", step=3, seconds=1.25)`. Times are in seconds."""
    _logger.log(level, event, extra={"fields": fields})


class _EventLine(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        fields: dict[str, object] = record.__dict__.get("fields", {})
        event = record.getMessage()
        if record.name != _logger.name:  # a line of a library: the event is the library, its text a field
            event, fields = record.name, {"message": event}
        words = [f"{moment}.{record.msecs:03.0f}", record.levelname, self._service, event]
        words += [f"{key}={_value(value)}" for key, value in fields.items()]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _value(value: object) -> str:
    """Text of a field, quoted where a reader could not see its end."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if text and not set(text) & set(' "=\n') else json.dumps(text, ensure_ascii=False)


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask the kernel for SIGKILL when the parent dies, so that a killed launcher leaves nothing behind (Linux only).

    The signal comes when the *thread* that forked this process ends, so fork from a main thread. A parent that died
    before this call sends nothing any more: then this process ends itself. Whoever knows the parent's id passes it;
    otherwise the launcher named in the environment tells whether there still is a run to belong to.
    """
    if sys.platform != "linux":
        return
    expected = os.getppid() if parent_pid is None else parent_pid
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER_PID, "")
    if os.getppid() != expected or (launcher and not _is_alive(int(launcher))):
        os._exit(1)


def _is_alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and waits for its parent to notice (a zombie) does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
