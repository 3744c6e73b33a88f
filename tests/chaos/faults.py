"""A seeded plan of faults, each a function that does it to a run and says what it hit."""

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from retort.config import ConfigError
from retort.queues.protocol import Keys
from services.trainer.checkpoint import _problem
from tests.chaos.forked import hold
from tests.chaos.network import Link
from tests.chaos.run import NO_ANSWER, ChaosRun, wait_until

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.6
PHASES = (
    *("", "waiting for a rollout replica", "waiting for rollouts", "saving", "validating"),
    *("training", "syncing weights") * 2,
)
"""What the trainer is waited to be doing before a fault; "" is whatever it does."""
LONGEST_WAIT_FOR_PHASE_S = 1.0
AT_WORK = ("waiting for rollouts", "training")


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
    diagnoses: int = 0
    wrong_diagnoses: list[str] = field(default_factory=list)
    """What the doctor said that did not name who was down."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._ends: list[tuple[float, str, Callable[[], object]]] = []
        """When to end what was done, to whom, and how."""
        self._waiting: dict[str, tuple[float, Callable[[], bool]]] = {}

    def do(self, faults: int, kinds: dict[str, float]) -> None:
        """So many faults, drawn by weight; fewer if the run ends before."""
        while len(self.hits) < faults:
            kind = self.random.choices(list(kinds), list(kinds.values()))[0]
            phase = self.random.choice(PHASES)
            self._pause(self.random.uniform(SHORTEST_PAUSE_S, LONGEST_PAUSE_S))
            state = self._wait_for(phase)
            if self.run.launcher.poll() is not None:
                return
            if FAULTS[kind](self):
                self.hits.append(Hit(kind, state))

    def _wait_for(self, phase: str) -> str:
        """Until the trainer is in that phase, for a while; what it is in then. Faults would else hit what lasts."""
        deadline = time.monotonic() + LONGEST_WAIT_FOR_PHASE_S
        while (now := self.run.phase()) != phase and phase and time.monotonic() < deadline:
            self._end_what_is_due()
            time.sleep(0.01)
        return now

    def finish(self, timeout_s: float = 400.0) -> int:
        """Wait for the end of the run, with nothing frozen any more."""
        deadline = time.monotonic() + timeout_s
        while self.run.launcher.poll() is None:
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: the end\n{self.run.tails()}"
            self._pause(0.1)
        self.end_everything()
        return self.run.launcher.returncode

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._end_what_is_due()
            self._note_recoveries()
            self.run.note_what_must_go()
            self.run.note_accepted()
            time.sleep(0.03)

    def replica(self) -> str:
        return f"rollout-{self.random.randrange(self.run.config.rollout.replicas)}"

    def link(self) -> Link:
        return self.run.network.links[self.random.choice(sorted(self.run.network.links))]

    def kill(self, name: str) -> bool:
        """SIGKILL; it is started again when the doctor has been asked."""
        pid = self.run.pid_of(name)
        if pid is None:
            return False  # the run may not even have a directory yet
        gate = hold(self.run.directory, name)
        gate.touch()
        try:
            return self.send(name, signal.SIGKILL) and self.ask_doctor(name, pid)
        finally:
            gate.unlink()

    def freeze(self, name: str, longest_s: float) -> bool:
        pid = self.run.pid_of(name)
        if pid is None or not self.send(name, signal.SIGSTOP):
            return False

        def thaw() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        self.end_later(longest_s, name, thaw)
        return self.ask_doctor(name, pid)

    def end_later(self, longest_s: float, name: str, end: Callable[[], object]) -> None:
        """Call `end` after a random while; until then `name` may be blamed."""
        self._ends.append((time.monotonic() + self.random.uniform(0.05, longest_s), name, end))

    def send(self, name: str, number: signal.Signals) -> bool:
        pid = self.run.pid_of(name)
        if pid is None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        if number == signal.SIGKILL:
            self.expect_recovery(name, pid)
        return True

    def ask_doctor(self, name: str, pid: int) -> bool:
        """It has to name the process that is down, or another that is. Always True: the fault was done."""
        if self.run.launcher.poll() is not None:
            return True
        wait_until(lambda: _is_down(pid), f"the effect of a signal on {name}")
        down = {name, *self._waiting, *(other for _, other, _ in self._ends)}
        try:
            diagnosis = self.run.diagnosis()
        except (*NO_ANSWER, ConfigError):
            return True  # the run has no files yet
        self.diagnoses += 1
        if diagnosis.waited_for not in down and self.run.pid_of(name) is not None:
            self.wrong_diagnoses.append(f"{name} was down, and the doctor said: {diagnosis.line()}")
        return True

    def ask_doctor_after_the_end(self) -> None:
        """The launcher was killed: it is to be named, whatever else died with it."""
        with contextlib.suppress(*NO_ANSWER):
            said = self.run.doctor()
            self.diagnoses += 1
            if "its launcher" not in said:
                self.wrong_diagnoses.append(f"the launcher was gone, and the doctor said: {said}")

    def expect_recovery(self, name: str, pid: int) -> None:
        epoch = self.run.epoch()

        def is_back() -> bool:
            now = self.run.pid_of(name)
            if now is None or now == pid:
                return False
            if name.startswith("rollout"):
                member = self.run.members().get(name)
                return member is not None and member.pid == now and member.state == "serving"
            if name == "trainer":
                return self.run.epoch() > epoch and self.run.phase() in AT_WORK
            with contextlib.suppress(*NO_ANSWER):
                return name != "redis" or bool(self.run.redis().ping())
            return False

        self._waiting[name] = (time.monotonic(), is_back)

    def _note_recoveries(self) -> None:
        for name, (since, is_back) in list(self._waiting.items()):
            if is_back():
                self.recovered_s.setdefault(name.partition("-")[0], []).append(time.monotonic() - since)
                del self._waiting[name]

    def _end_what_is_due(self) -> None:
        for entry in [entry for entry in self._ends if time.monotonic() >= entry[0]]:
            entry[2]()
            self._ends.remove(entry)

    def end_everything(self) -> None:
        """Nothing is frozen or held any more."""
        for _, _, end in self._ends:
            end()
        self._ends.clear()


def _is_down(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return True


def exhaust_memory(chaos: Chaos) -> bool:
    """A service at its memory limit: for a while nothing that it asks of the system is granted. It may die of that."""
    name = chaos.random.choice(["trainer", "reward", chaos.replica()])
    pid = chaos.run.pid_of(name)
    if pid is None:
        return False
    try:
        before = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (0, before[1]))
    except ProcessLookupError:
        return False

    def grant() -> None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_AS, before)

    chaos.end_later(1.5, name, grant)
    return True


def kill_rank(chaos: Chaos) -> bool:
    """One trainer rank of several; with a single one, the trainer."""
    pid = chaos.run.pid_of("trainer")
    if pid is None:
        return False
    gate = hold(chaos.run.directory, "trainer")
    gate.touch()
    try:
        ranks = psutil.Process(pid).children()
        chaos.random.choice(ranks or [psutil.Process(pid)]).kill()
        chaos.expect_recovery("trainer", pid)
        return chaos.ask_doctor("trainer", pid)
    except psutil.NoSuchProcess:
        return False
    finally:
        gate.unlink()


def kill_launcher(chaos: Chaos) -> bool:
    """Everything below it dies with it; then somebody types --resume."""
    chaos.end_everything()
    chaos.run.launcher.kill()
    chaos.run.launcher.wait()
    chaos.ask_doctor_after_the_end()
    wait_until(lambda: not chaos.run.processes(), "the end of what the killed launcher had started", 10)
    chaos.run.resume()
    return True


def empty_redis(chaos: Chaos) -> bool:
    """Everything, the function library included."""
    try:
        redis = chaos.run.redis()
        redis.flushall()
        redis.function_flush()
    except NO_ANSWER:
        return False
    return True


def forget_suffix(chaos: Chaos) -> bool:
    """Redis dies and comes back without the end of its history, as after a loss of power."""
    files = list((chaos.run.directory / "redis").glob("appendonlydir/*.incr.aof"))
    if not files:
        return False
    gate = hold(chaos.run.directory, "redis")
    gate.touch()
    try:
        if not chaos.send("redis", signal.SIGKILL):
            return False
        newest = max(files, key=lambda file: file.stat().st_mtime)
        lost = chaos.random.randrange(1, 60_000)
        os.truncate(newest, max(newest.stat().st_size - lost, 0))
    finally:
        gate.unlink()
    return True


def damage_checkpoint(chaos: Chaos) -> bool:
    """One flipped bit in the newest checkpoint, while another is whole, and a trainer that has to read it."""
    found = sorted((chaos.run.directory / "checkpoints").glob("step-??????"))
    if len(found) < 2 or any(_problem(path) for path in found):
        return False
    file = chaos.random.choice([*found[-1].glob("*.safetensors"), found[-1] / "MANIFEST.json"])
    try:
        data = bytearray(file.read_bytes())
        data[chaos.random.randrange(len(data))] ^= 1 << chaos.random.randrange(8)
        replacement = file.with_name("flipped")
        replacement.write_bytes(data)
        replacement.replace(file)
    except FileNotFoundError:
        return False  # the trainer has just deleted it
    return chaos.kill("trainer") or True


def damage_entry(chaos: Chaos) -> bool:
    """A finished group in which one bit has flipped, in the place of the right one.

    Under a new entry id, since Redis changes no entry; of a work item the id is part of its group's state.
    """
    with contextlib.suppress(*NO_ANSWER):
        redis, keys = chaos.run.redis(), Keys(chaos.run.run_id)
        stream = keys.groups("train")
        entries: Any = redis.xrange(stream, count=20)
        if not entries:
            return False
        entry_id, fields = chaos.random.choice(entries)
        data = bytearray(fields[b"data"])
        data[chaos.random.randrange(len(data))] ^= 1 << chaos.random.randrange(8)
        with redis.pipeline(transaction=True) as pipeline:
            pipeline.xdel(stream, entry_id)
            pipeline.xadd(stream, {**fields, b"data": bytes(data)})
            pipeline.execute()
        return True
    return False


def hold_link(chaos: Chaos) -> bool:
    """Nothing arrives for a while, and no connection is closed."""
    link = chaos.link()
    chaos.run.network.do(link.hold)
    chaos.end_later(1.5, "", lambda: chaos.run.network.do(link.let_pass))
    return True


def slow_link(chaos: Chaos) -> bool:
    """Every packet is late for a while."""
    link, delay_s = chaos.link(), chaos.random.uniform(0.01, 0.2)
    link.delay_s = delay_s
    chaos.end_later(1.5, "", lambda: chaos.run.network.do(link.let_pass))
    return True


def reset_link(chaos: Chaos) -> bool:
    chaos.run.network.do(chaos.link().reset)
    return True


def swallow_reply(chaos: Chaos) -> bool:
    """The next call is carried out, and the caller does not learn it."""
    chaos.link().swallows_a_reply = True
    return True


def jump_clock(chaos: Chaos) -> bool:
    """The clock of every process of the run is set, forward or back, by up to an hour."""
    chaos.run.jump_to(chaos.random.uniform(-3600.0, 3600.0))
    return True


FAULTS: dict[str, Callable[[Chaos], bool]] = {
    "kill replica": lambda chaos: chaos.kill(chaos.replica()),
    "kill reward": lambda chaos: chaos.kill("reward"),
    "kill trainer": kill_rank,
    "kill launcher": kill_launcher,
    "kill redis": lambda chaos: chaos.kill("redis"),
    "freeze replica": lambda chaos: chaos.freeze(chaos.replica(), 1.5),
    "freeze reward": lambda chaos: chaos.freeze("reward", 1.0),
    "freeze trainer": lambda chaos: chaos.freeze("trainer", 1.0),
    "freeze redis": lambda chaos: chaos.freeze("redis", 1.0),
    "exhaust memory": exhaust_memory,
    "empty redis": empty_redis,
    "redis forgets": forget_suffix,
    "damage checkpoint": damage_checkpoint,
    "damage entry": damage_entry,
    "hold link": hold_link,
    "slow link": slow_link,
    "reset link": reset_link,
    "swallow reply": swallow_reply,
    "jump clock": jump_clock,
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
    "damage entry": 2,
    "hold link": 2,
    "slow link": 2,
    "reset link": 4,
    "swallow reply": 4,
    "jump clock": 1,
}
