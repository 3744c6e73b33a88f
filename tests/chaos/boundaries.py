"""The operations of a process after which somebody else could see something changed, and death before or after each.

A boundary is "before" or "after" the n-th operation of a name. Reads, signs of life and asking again repeat while a
process waits, as often as time has it; of those, only the first after each other operation counts, and of a replica,
which does several things beside each other, only the first of all. So a run has the same boundaries every time, but for
those of a replica that has to be synced once more. A launcher looks at many things over and over: of each thing that it
does to a file or a process of that name, the first counts.
"""

import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
import redis.asyncio
import redis.client

import retort.weight_sync
import services.trainer.checkpoint
import services.trainer.export
from retort.cli import processes
from services.rollout.reward_client import RewardClient
from services.rollout.simulated_model import SimulatedModel
from services.rollout.weight_receiver import WeightReceiver
from services.trainer.weight_sender import WeightSender

REPEATED = (
    *("XREAD", "HGETALL", "HSET", "GET", "XRANGE", "PING", "INFO", "pipeline", "FUNCTION", "FCALL issue"),
    *("FCALL declare", "FCALL take", "FCALL announce", "FCALL renew", "FCALL progress"),
)
BESIDE_EACH_OTHER = ("score", "FCALL submit", "bucket")


class Boundaries:
    """Counts the boundaries of this process; writes their names to a file, or kills the process at one of them."""

    def __init__(self, names: Path, kill_at: str) -> None:
        self._names = os.open(names, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._kill_at = kill_at
        self._seen: set[str] = set()
        self._last = "the start"
        self._does_one_thing_at_a_time = True
        self._only_first_of_a_name = False
        self._process = os.getpid()  # what is forked from here passes no boundaries
        self._of_name: Counter[str] = Counter()

    def of_a_trainer(self) -> None:
        """From now on this process, a trainer, passes boundaries."""
        self._wrap(redis.Redis, "execute_command", lambda _, name, *args, **__: _command(name, *args))
        self._wrap(redis.client.Pipeline, "execute", lambda *_, **__: "pipeline")
        for name in ("fsync", "rename", "replace", "unlink", "mkdir", "pwrite"):
            self._wrap(os, name, lambda *_, name=name, **__: name)
        self._wrap(shutil, "rmtree", lambda *_, **__: "rmtree")
        self._wrap(Path, "write_text", lambda path, *_, **__: f"write {path.suffix}")
        for module in (services.trainer.checkpoint, services.trainer.export):
            self._wrap(module, "save_file", lambda *_, **__: "save_file")
        self._wrap(retort.weight_sync, "_start_broadcast", lambda *_, **__: "broadcast")
        self._wrap_async(WeightSender, "_ask", lambda _, __, phase, *___: f"ask {phase}")

    def of_a_replica(self) -> None:
        """From now on this process, a replica with the simulated engine, passes boundaries."""
        self._does_one_thing_at_a_time = False
        self._wrap_async(redis.asyncio.Redis, "execute_command", lambda _, name, *args, **__: _command(name, *args))
        self._wrap_async(RewardClient, "score", lambda *_, **__: "score")
        for phase in ("prepare", "transfer", "probe", "commit"):
            self._wrap_async(WeightReceiver, phase, lambda *_, phase=phase, **__: f"answer {phase}")
        self._wrap(retort.weight_sync, "_start_broadcast", lambda *_, **__: "bucket")
        self._wrap_async(SimulatedModel, "load", lambda *_, **__: "load")

    def of_a_launcher(self, run: Path) -> None:
        """From now on this process, the launcher of the run in that directory, passes boundaries."""

        def name_of(path: Any) -> str:
            return "the run" if Path(path) == run else Path(path).name

        self._only_first_of_a_name = True
        self._wrap(redis.Redis, "execute_command", lambda _, name, *args, **__: _command(name, *args))
        self._wrap(processes, "_spawn", lambda program: f"spawn {program.name}")
        self._wrap(subprocess.Popen, "send_signal", lambda _, number: f"send {signal.Signals(number).name}")
        self._wrap(Path, "write_text", lambda path, *_, **__: f"write {path.name}")
        self._wrap(os, "replace", lambda _, path, **__: f"replace {Path(path).name}")
        for name in ("open", "mkdir", "unlink"):
            self._wrap(os, name, lambda path, *_, name=name, **__: f"{name} {name_of(path)}")

    def _pass(self, side: str, operation: str) -> None:
        name = f"{side} {operation}"
        if name in self._seen or os.getpid() != self._process:
            return
        self._seen.add(name)
        os.write(self._names, f"{name}\n".encode())
        if name == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _enter(self, label: str) -> str:
        """Passes the boundary before an operation; answers what the operation is called."""
        if self._only_first_of_a_name:
            operation = label
        elif label.startswith(REPEATED):
            operation = f"{label} after {self._last}" if self._does_one_thing_at_a_time else label
        else:
            self._of_name[label] += 1
            operation = f"{label} #{self._of_name[label]}"
            if not label.startswith(BESIDE_EACH_OTHER):
                self._last = operation
        self._pass("before", operation)
        return operation

    def _wrap(self, owner: Any, name: str, label: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            operation = self._enter(label(*args, **kwargs))
            result = original(*args, **kwargs)
            self._pass("after", operation)
            return result

        setattr(owner, name, wrapped)

    def _wrap_async(self, owner: Any, name: str, label: Callable[..., str]) -> None:
        original = getattr(owner, name)

        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            operation = self._enter(label(*args, **kwargs))
            result = await original(*args, **kwargs)
            self._pass("after", operation)
            return result

        setattr(owner, name, wrapped)


def _command(name: str, *args: Any) -> str:
    return f"{name} {str(args[0]).rpartition('_')[2]}" if name == "FCALL" else name
