"""The operations of a trainer after which somebody else could see something changed, and death before or after each.

A boundary is "before" or "after" the n-th such operation. Reads, signs of life and asking again repeat while a trainer
waits, as often as time has it; of those, only the first after each other operation counts, so that a run has the same
boundaries every time, unless a replica has to be synced once more.
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
import redis.client

import retort.weight_sync
import services.trainer.checkpoint
import services.trainer.export
from services.trainer.weight_sender import WeightSender

REPEATED = (
    "XREAD",
    "HGETALL",
    "FCALL progress",
    "GET",
    "XRANGE",
    "PING",
    "INFO",
    "pipeline",
    "FUNCTION",
    "FCALL issue",
)


class Boundaries:
    """Counts the boundaries of this process; writes their names to a file, or kills the process at one of them."""

    def __init__(self, names: Path, kill_at: str) -> None:
        self._names = os.open(names, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._kill_at = kill_at
        self._seen: set[str] = set()
        self._operations = 0

    def install(self) -> None:
        """From now on this process passes boundaries."""
        self._wrap(redis.Redis, "execute_command", lambda _, name, *args, **__: _command(name, *args))
        self._wrap(redis.client.Pipeline, "execute", lambda *_, **__: "pipeline")
        for name in ("fsync", "rename", "replace", "unlink", "mkdir", "pwrite"):
            self._wrap(os, name, lambda *_, name=name, **__: name)
        self._wrap(shutil, "rmtree", lambda *_, **__: "rmtree")
        self._wrap(Path, "write_text", lambda path, *_, **__: f"write {path.suffix}")
        for module in (services.trainer.checkpoint, services.trainer.export):
            self._wrap(module, "save_file", lambda *_, **__: "save_file")
        self._wrap(retort.weight_sync, "_start_broadcast", lambda *_, **__: "broadcast")
        for name in ("_prepare", "_ask"):
            if hasattr(WeightSender, name):
                self._wrap_async(WeightSender, name, lambda _, __, phase, *___: f"ask {phase}")

    def _pass(self, side: str, label: str) -> None:
        name = f"{side} {label} @{self._operations}"
        if name in self._seen:
            return
        self._seen.add(name)
        os.write(self._names, f"{name}\n".encode())
        if name == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _enter(self, label: str) -> None:
        if not label.startswith(REPEATED):
            self._operations += 1
        self._pass("before", label)

    def _wrap(self, owner: Any, name: str, label: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._enter(label(*args, **kwargs))
            result = original(*args, **kwargs)
            self._pass("after", label(*args, **kwargs))
            return result

        setattr(owner, name, wrapped)

    def _wrap_async(self, owner: Any, name: str, label: Callable[..., str]) -> None:
        original = getattr(owner, name)

        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._enter(label(*args, **kwargs))
            result = await original(*args, **kwargs)
            self._pass("after", label(*args, **kwargs))
            return result

        setattr(owner, name, wrapped)


def _command(name: str, *args: Any) -> str:
    return f"{name} {str(args[0]).rpartition('_')[2]}" if name == "FCALL" else name
