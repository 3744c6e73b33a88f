"""`retort doctor [RUN_DIR]`: who waits for whom, since when, why, and the command that helps.

Reads the run's files, its Redis and this machine's process table, asks no service and changes nothing, so it answers
also when everything hangs.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from redis.exceptions import RedisError

from retort.cli.invocation import command
from retort.cli.liveness import condition
from retort.cli.status import newest_run, read_status, redis_of, replicas_shown, status_lines
from retort.config import ConfigError, TrackerName
from retort.queues import DeadWork, InFlight, Kind, Member, PendingLease, RunView

REWARD = "the reward service"
"""What a replica says that it waits for."""
SILENT_S = 10.0
"""Who says something every second or oftener and has not for so long, is dead or frozen."""
LONG_STEP_S = 60.0
"""A trainer that computes says nothing meanwhile; after so long it is worth a look."""


@dataclass(frozen=True)
class Diagnosis:
    """One finding. As a line: `waiting` waits for `waited_for`, since when, why, and what to type."""

    waiting: str
    waited_for: str
    since_s: float
    """How long already, in seconds."""
    why: str
    command: str

    def line(self) -> str:
        since = f"since {self.since_s:.0f} s"
        return f"{self.waiting} waits for {self.waited_for}, {since}: {self.why}. Try: {self.command}"


@dataclass(frozen=True)
class Evidence:
    """What the files and Redis say at one moment."""

    directory: Path
    now: float
    status: Mapping[str, Any]
    """status.json, from the launcher."""
    redis_answers: bool
    memory_share: float = 0.0
    """How much of its memory limit Redis uses."""
    progress: Mapping[str, str] = field(default_factory=dict)
    members: Mapping[str, Member] = field(default_factory=dict)
    in_flight: InFlight | None = None
    lease: PendingLease | None = None
    """The oldest, of the kind of work that the trainer waits for."""
    dead: list[DeadWork] = field(default_factory=list)
    """Work that failed under the present trainer."""
    conditions: Mapping[str, str] = field(default_factory=dict)
    """What this machine's process table says of the launcher and of each service: see `liveness.condition`."""

    def silent_s(self, member: Member) -> float:
        return self.now - member.updated

    def log(self, name: str) -> str:
        return f"less {self.directory / 'logs' / name}.log"

    @property
    def trainer_silent_s(self) -> float:
        return self.now - float(self.progress.get("updated", self.now))

    @property
    def waited_s(self) -> float:
        return self.now - float(self.progress.get("since", self.now))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", nargs="?", type=Path, help="directory of the run; default: the newest under runs/")
    parser.add_argument("--json", action="store_true", help="print the diagnosis as one JSON object")


def main(args: argparse.Namespace) -> int:
    directory = (args.run_dir or newest_run(Path("runs"))).resolve()
    evidence = gather(directory)
    diagnosis = diagnose(evidence)
    if args.json:
        print(json.dumps({**dataclasses.asdict(diagnosis), "line": diagnosis.line(), "status": evidence.status}))
        return 0
    print(diagnosis.line())
    print("\n".join(status_lines(directory, evidence.status, replicas_shown(evidence.members), evidence.now)))
    return 0


def gather(directory: Path) -> Evidence:
    """Look once. A Redis that does not answer is a finding, not an error."""
    status, now = read_status(directory), time.time()
    conditions = {process["name"]: condition(process) for process in status["processes"]}
    conditions["launcher"] = condition(status["launcher"], alone=True)  # below it are all the others
    seen = Evidence(directory, now, status, redis_answers=False, conditions=conditions)
    try:
        return _with_redis(seen)
    except (RedisError, ConfigError, ValueError):
        return seen


def _with_redis(seen: Evidence) -> Evidence:
    view = RunView(*redis_of(seen.directory, seen.status))
    progress = view.progress()
    kind: Kind = "validation" if progress.get("phase") == "validating" else "train"
    epoch = view.highest_epoch()
    return dataclasses.replace(
        seen,
        redis_answers=True,
        memory_share=view.memory_share(),
        progress=progress,
        members=view.members(),
        in_flight=view.in_flight(kind),
        lease=view.oldest_lease(kind),
        dead=[work for work in view.dead() if work.cause == "failed" and work.epoch == epoch],
    )


def diagnose(evidence: Evidence) -> Diagnosis:
    """The first rule that finds something, from what everything needs to what only one waits for."""
    rules: tuple[Callable[[Evidence], Diagnosis | None], ...] = (
        _run_has_ended,
        _launcher_is_gone,
        _process_is_down,
        _redis_is_away,
        _redis_is_full,
        _work_was_given_up,
        _trainer_is_silent,
        _no_replica,
        _replica_is_silent,
        _reward_service_is_slow,
        _groups_are_in_work,
    )
    found = (rule(evidence) for rule in rules)
    nothing = Diagnosis("nobody", "anybody", 0.0, _progress_in_words(evidence), command("status"))
    return next((diagnosis for diagnosis in found if diagnosis), nothing)


def _progress_in_words(evidence: Evidence) -> str:
    phase, step = evidence.progress.get("phase", "starting"), evidence.progress.get("step", "-")
    warning = evidence.progress.get("warning", "")
    return f"the trainer is at step {step}, phase {phase}" + (f"; look at this: {warning}" if warning else "")


def _run_has_ended(evidence: Evidence) -> Diagnosis | None:
    code = evidence.status["exit_code"]
    if code is None:
        return None
    action = command("report", evidence.directory) if code == 0 else _resume(evidence)
    ago = evidence.now - evidence.status["updated"]
    why = f"the run has ended ({evidence.status['phase']}, exit code {code})"
    return Diagnosis("nobody", "anybody", ago, why, action)


def _launcher_is_gone(evidence: Evidence) -> Diagnosis | None:
    age, state = evidence.now - evidence.status["updated"], evidence.conditions.get("launcher", "unknown")
    if state == "frozen":
        pid = evidence.status["launcher"]["pid"]
        why = f"its process {pid} was stopped by a signal"
        return Diagnosis("the run", "its launcher", age, why, f"kill -CONT {pid}")
    if state == "gone":
        return Diagnosis("the run", "its launcher", age, "its process is gone", _resume(evidence))
    if age < SILENT_S:
        return None
    return Diagnosis("the run", "its launcher", age, "status.json is not written any more", _resume(evidence))


def _resume(evidence: Evidence) -> str:
    return command("run", evidence.directory / "config.toml", "--resume")


def _process_is_down(evidence: Evidence) -> Diagnosis | None:
    """A service that was stopped by a signal, or died and does not run yet; first those that more wait for."""
    # Nobody waits for a tracker.
    processes = {
        process["name"]: process
        for process in evidence.status["processes"]
        if process["name"] not in get_args(TrackerName)
    }
    for name in sorted(processes, key=lambda name: (name != "redis", name != "trainer", name != "reward", name)):
        state, pid = evidence.conditions.get(name), processes[name]["pid"]
        if state not in ("frozen", "gone") or processes[name]["state"] == "exited":
            continue
        why, command = f"its process {pid} was stopped by a signal", f"kill -CONT {pid}"
        if state == "gone":
            times = processes[name]["restarts"]
            why, command = f"it is being started; it was started again {times} times before", evidence.log(name)
        waiting = "trainer" if name.startswith("rollout") else "everybody"
        return Diagnosis(waiting, name, _silent_s(evidence, name), why, command)
    return None


def _silent_s(evidence: Evidence, name: str) -> float:
    """Since when nothing was heard of a service that speaks in Redis; of another, since the launcher looked."""
    if name == "trainer" and evidence.progress:
        return evidence.trainer_silent_s
    member = evidence.members.get(name)
    return evidence.silent_s(member) if member else evidence.now - float(evidence.status["updated"])


def _redis_is_away(evidence: Evidence) -> Diagnosis | None:
    if evidence.redis_answers:
        return None
    restarts = {process["name"]: process["restarts"] for process in evidence.status["processes"]}
    why = f"it does not answer, and was started again {restarts.get('redis', 0)} times"
    return Diagnosis("everybody", "redis", evidence.now - evidence.status["updated"], why, evidence.log("redis"))


def _redis_is_full(evidence: Evidence) -> Diagnosis | None:
    if evidence.memory_share < 1:
        return None
    why = "Redis is at its memory limit: it takes no more work until groups have left it with a checkpoint"
    return Diagnosis("trainer", "redis", evidence.waited_s, why, "a larger maxmemory, or fewer other things in it")


def _work_was_given_up(evidence: Evidence) -> Diagnosis | None:
    if not evidence.dead:
        return None
    work = evidence.dead[-1]
    action = command("dead", "show", evidence.directory, work.entry_id)
    return Diagnosis("trainer", f"group {work.group_id}", evidence.waited_s, f"it was given up: {work.reason}", action)


def _trainer_is_silent(evidence: Evidence) -> Diagnosis | None:
    if not evidence.progress:
        return Diagnosis("the run", "trainer", 0.0, "it has not said anything yet", evidence.log("trainer"))
    waits = bool(evidence.progress.get("waiting_for"))
    silent_s = evidence.trainer_silent_s
    if silent_s < (SILENT_S if waits else LONG_STEP_S):
        return None
    why = f"it has said nothing since, in phase {evidence.progress['phase']}: dead, frozen, or computing for long"
    return Diagnosis("everybody", "trainer", silent_s, why, evidence.log("trainer"))


def _no_replica(evidence: Evidence) -> Diagnosis | None:
    if not evidence.progress.get("waiting_for"):
        return None
    names = [process["name"] for process in evidence.status["processes"] if process["name"].startswith("rollout")]
    silent = [name for name in names if name not in evidence.members]
    if evidence.members or not names:
        return None
    why = "no replica has announced itself"
    return Diagnosis("trainer", silent[0], evidence.waited_s, why, evidence.log(silent[0]))


def _replica_is_silent(evidence: Evidence) -> Diagnosis | None:
    """The replica that has what the trainer waits for, or any while none serves."""
    if not evidence.progress.get("waiting_for"):
        return None
    holder = evidence.members.get(evidence.lease.replica) if evidence.lease else None
    none_serves = not any(_serves(evidence, member) for member in evidence.members.values())
    for member in [holder] if holder else list(evidence.members.values()) if none_serves else []:
        if evidence.silent_s(member) > SILENT_S:
            why = f"nothing was heard of it (pid {member.pid}) since; it was {member.state}"
            return Diagnosis("trainer", member.name, evidence.silent_s(member), why, evidence.log(member.name))
        if member.state != "serving":
            wanting = f" and waits for {member.waiting_for}" if member.waiting_for else ""
            why = f"it is {member.state}{wanting}"
            return Diagnosis("trainer", member.name, evidence.waited_s, why, evidence.log(member.name))
    return None


def _serves(evidence: Evidence, member: Member) -> bool:
    return member.state == "serving" and evidence.silent_s(member) <= SILENT_S


def _reward_service_is_slow(evidence: Evidence) -> Diagnosis | None:
    for member in evidence.members.values():
        if evidence.progress.get("waiting_for") and member.waiting_for == REWARD and _serves(evidence, member):
            why = f"{member.name} has asked it for scores and has no answer"
            return Diagnosis("trainer", "reward", evidence.waited_s, why, evidence.log("reward"))
    return None


def _groups_are_in_work(evidence: Evidence) -> Diagnosis | None:
    waiting_for, flight = evidence.progress.get("waiting_for"), evidence.in_flight
    if not waiting_for or not flight:
        return None
    holder = f" by {evidence.lease.replica}" if evidence.lease else ""
    why = f"{flight.leased} are being sampled{holder}, {flight.waiting} wait for a replica, {flight.finished} are there"
    return Diagnosis("trainer", waiting_for, evidence.waited_s, why, command("status"))
