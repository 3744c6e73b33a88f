"""How every process starts: its log lines, and its tie to the process that started it.

A log line is an event with fields, on stderr, for people and, with LOG_FORMAT=json, for machines:

    2026-03-01T12:00:00.123 INFO rollout-0 weights_committed version=3 seconds=0.045
    {"time": "2026-03-01T12:00:00.123Z", "level": "INFO", "run": "tiny", "service": "rollout-0", "event": "weights_..."}

What `log_with` was told stands in every later line of the same task. SIGUSR1 prints the stack of every thread.
"""

import ctypes
import faulthandler
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType, TracebackType

LAUNCHER_PID = "RETORT_LAUNCHER_PID"
"""Environment variable in which `retort run` leaves its process id for everything below it."""

LOG_FORMAT = "LOG_FORMAT"
"""Environment variable: `json` for one JSON object a line, which is what containers are built with."""

_PR_SET_PDEATHSIG = 1
_logger = logging.getLogger("retort")
_context: ContextVar[Mapping[str, object]] = ContextVar("log_context", default=MappingProxyType({}))


def start_logging(service: str, level: int = logging.INFO) -> None:
    """Send every log record of this process to stderr, one line each; `service` is the name of the process."""
    for_machines = os.environ.get(LOG_FORMAT) == "json"
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(_JsonLine(service) if for_machines else _EventLine(service))
    logging.basicConfig(handlers=[lines], level=logging.WARNING, force=True)
    _logger.setLevel(level)
    if for_machines:
        sys.excepthook = _log_crash
    faulthandler.register(signal.SIGUSR1)


def log_with(**fields: object) -> None:
    """Have these fields in every later line of this task and of the tasks that it starts: run, step, version, group."""
    _context.set({**_context.get(), **fields})


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
        # A reader of this file knows which run it is of.
        known = {key: value for key, value in _context.get().items() if key != "run"}
        words += [
            f"{key}={_value(value)}"
            for key, value in {**fields, **{k: v for k, v in known.items() if k not in fields}}.items()
        ]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonLine(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, object] = {"time": moment, "level": record.levelname, "service": self._service}
        if record.name == _logger.name:
            line["event"] = record.getMessage()
        else:
            line |= {"event": record.name, "message": record.getMessage()}
        line |= _context.get() | record.__dict__.get("fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({key: _json_value(value) for key, value in line.items()}, ensure_ascii=False)


def _json_value(value: object) -> object:
    """Numbers and truth values as they are; NaN, which JSON does not have, and everything else as text."""
    is_plain = value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else str(value)


def _log_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _logger.critical("crashed", exc_info=(kind, error, trace))


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
