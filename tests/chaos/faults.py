"""A seeded plan of faults, each a function that does it to a run and says what it hit."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
from redis.exceptions import RedisError

from services.trainer.checkpoint import _problem
from tests.chaos.forked import REDIS_WAITS
from tests.chaos.run import ChaosRun, wait_until

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0
PHASES = (
    "",
    "waiting for a rollout replica",
    "waiting for rollouts",
    "training",
    "training",
    "syncing weights",
    "syncing weights",
    "saving",
    "validating",
)
"""What the trainer is waited to be doing before a fault; "" is whatever it does."""
LONGEST_WAIT_FOR_PHASE_S = 2.5


@dataclass(frozen=True)
class Hit:
    """A fault that was done."""

    kind: str
    state: str
    """What the trainer, or the replica that was hit, was doing."""


@dataclass
class Chaos:
    """Does the faults of a plan to a run, one after the other, with random pauses."""

    run: ChaosRun
    seed: int
    hits: list[Hit] = field(default_factory=list)
    recovered_s: dict[str, list[float]] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    """Trainer calls that Redis accepted: entry id -> epoch, gathered while it still knows them."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._thaw_at: list[tuple[float, int]] = []
        self._waiting: dict[str, tuple[float, Callable[[], bool]]] = {}

    def do(self, faults: int, kinds: dict[str, float]) -> None:
        """So many faults, drawn by weight; fewer if the run ends before."""
        while len(self.hits) < faults:
            kind = self._random.choices(list(kinds), list(kinds.values()))[0]
            phase = self._random.choice(PHASES)
            self._pause(self._random.uniform(SHORTEST_PAUSE_S, LONGEST_PAUSE_S))
            state = self._wait_for(phase)
            if self.run.launcher.poll() is not None:
                return
            if FAULTS[kind](self):
                self.hits.append(Hit(kind, state))

    def _wait_for(self, phase: str) -> str:
        """Until the trainer is in that phase, for a while; what it is in then. Faults would else hit what lasts."""
        deadline = time.monotonic() + LONGEST_WAIT_FOR_PHASE_S
        while (now := self.run.phase()) != phase and phase and time.monotonic() < deadline:
            self._thaw()
            time.sleep(0.002)
        return now

    def finish(self, timeout_s: float = 400.0) -> int:
        """Wait for the end of the run, with nothing frozen any more."""
        deadline = time.monotonic() + timeout_s
        while self.run.launcher.poll() is None:
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: the end\n{self.run.tails()}"
            self._pause(0.1)
        self._thaw(everything=True)
        return self.run.launcher.returncode

    def accepted_epochs(self) -> list[int]:
        """Of the trainer calls that Redis accepted, in its order; entry ids begin with milliseconds."""
        in_order = sorted(self.accepted, key=lambda entry: [int(part) for part in entry.split("-")])
        return [self.accepted[entry] for entry in in_order]

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._thaw()
            self._note_recoveries()
            self.run.note_what_must_go()
            self.accepted |= {entry: epoch for entry, epoch, _ in self.run.accepted()}
            time.sleep(0.03)

    def replica(self) -> str:
        return f"rollout-{self._random.randrange(self.run.config.rollout.replicas)}"

    def kill(self, name: str) -> bool:
        return self.send(name, signal.SIGKILL)

    def freeze(self, name: str, longest_s: float) -> bool:
        pid = self.run.pid_of(name)
        if pid is None or not self.send(name, signal.SIGSTOP):
            return False
        self._thaw_at.append((time.monotonic() + self._random.uniform(0.05, longest_s), pid))
        return True

    def send(self, name: str, number: signal.Signals) -> bool:
        pid = self.run.pid_of(name)
        if pid is None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        if number == signal.SIGKILL:
            self._expect_recovery(name, pid)
        return True

    def _expect_recovery(self, name: str, pid: int) -> None:
        epoch = self.run.epoch()

        def is_back() -> bool:
            now = self.run.pid_of(name)
            if now is None or now == pid:
                return False
            if name.startswith("rollout"):
                member = self.run.members().get(name)
                return member is not None and member.pid == now and member.state == "serving"
            if name == "trainer":
                return self.run.epoch() > epoch and self.run.phase() == "waiting for rollouts"
            with contextlib.suppress(RedisError):
                return name != "redis" or bool(self.run.redis().ping())
            return False

        self._waiting[name] = (time.monotonic(), is_back)

    def _note_recoveries(self) -> None:
        for name, (since, is_back) in list(self._waiting.items()):
            if is_back():
                self.recovered_s.setdefault(name.partition("-")[0], []).append(time.monotonic() - since)
                del self._waiting[name]

    def _thaw(self, everything: bool = False) -> None:
        for due, pid in list(self._thaw_at):
            if everything or time.monotonic() >= due:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                self._thaw_at.remove((due, pid))


def kill_rank(chaos: Chaos) -> bool:
    """One trainer rank of several; with a single one, the trainer."""
    pid = chaos.run.pid_of("trainer")
    if pid is None:
        return False
    try:
        ranks = psutil.Process(pid).children()
        chaos._random.choice(ranks or [psutil.Process(pid)]).kill()
    except psutil.NoSuchProcess:
        return False
    chaos._expect_recovery("trainer", pid)
    return True


def kill_launcher(chaos: Chaos) -> bool:
    """Everything below it dies with it; then somebody types --resume."""
    chaos._thaw(everything=True)
    chaos.run.launcher.kill()
    chaos.run.launcher.wait()
    wait_until(lambda: not chaos.run.processes(), "the end of what the killed launcher had started", 10)
    chaos.run.resume()
    return True


def empty_redis(chaos: Chaos) -> bool:
    """Everything, the function library included."""
    try:
        redis = chaos.run.redis()
        redis.flushall()
        redis.function_flush()
    except (RedisError, FileNotFoundError, ValueError):
        return False
    return True


def forget_suffix(chaos: Chaos) -> bool:
    """Redis dies and comes back without the end of its history, as after a loss of power."""
    gate = chaos.run.directory / REDIS_WAITS
    files = list((chaos.run.directory / "redis").glob("appendonlydir/*.incr.aof"))
    if not files:
        return False
    gate.touch()
    try:
        if not chaos.kill("redis"):
            return False
        newest = max(files, key=lambda file: file.stat().st_mtime)
        lost = chaos._random.randrange(1, 60_000)
        os.truncate(newest, max(newest.stat().st_size - lost, 0))
    finally:
        gate.unlink()
    return True


def damage_checkpoint(chaos: Chaos) -> bool:
    """One flipped bit in the newest checkpoint, while another is whole, and a trainer that has to read it."""
    found = sorted((chaos.run.directory / "checkpoints").glob("step-??????"))
    if len(found) < 2 or any(_problem(path) for path in found):
        return False
    file = chaos._random.choice([*found[-1].glob("*.safetensors"), found[-1] / "MANIFEST.json"])
    try:
        data = bytearray(file.read_bytes())
        data[chaos._random.randrange(len(data))] ^= 1 << chaos._random.randrange(8)
        replacement = file.with_name("flipped")
        replacement.write_bytes(data)
        replacement.replace(file)
    except FileNotFoundError:
        return False  # the trainer has just deleted it
    return chaos.kill("trainer") or True


FAULTS: dict[str, Callable[[Chaos], bool]] = {
    "kill replica": lambda chaos: chaos.kill(chaos.replica()),
    "kill reward": lambda chaos: chaos.kill("reward"),
    "kill trainer": kill_rank,
    "kill launcher": kill_launcher,
    "kill redis": lambda chaos: chaos.kill("redis"),
    "freeze replica": lambda chaos: chaos.freeze(chaos.replica(), 4.0),
    "freeze reward": lambda chaos: chaos.freeze("reward", 2.0),
    "freeze trainer": lambda chaos: chaos.freeze("trainer", 2.0),
    "freeze redis": lambda chaos: chaos.freeze("redis", 2.0),
    "empty redis": empty_redis,
    "redis forgets": forget_suffix,
    "damage checkpoint": damage_checkpoint,
}
WEIGHTS = {
    "kill replica": 5,
    "kill reward": 3,
    "kill trainer": 4,
    "kill launcher": 1,
    "kill redis": 3,
    "freeze replica": 4,
    "freeze reward": 2,
    "freeze trainer": 2,
    "freeze redis": 2,
    "empty redis": 2,
    "redis forgets": 2,
    "damage checkpoint": 1,
}
