"""The story of a run on this machine: start the services, follow the trainer, stop everything, tell how it went."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from redis.exceptions import RedisError
from rich.console import Console

from retort.cli.doctor import diagnose, gather
from retort.cli.interrupts import Interrupts
from retort.cli.invocation import command
from retort.cli.liveness import identity
from retort.cli.panel import STOPPING, Screen, clock, step_line, validation_line
from retort.cli.preflight import is_listening
from retort.cli.process_table import answers, open_redis, plan_programs
from retort.cli.processes import Ending, Program, RestartPolicy, Supervisor, last_lines
from retort.cli.run_directory import open_run_directory
from retort.cli.status import write_status
from retort.cli.watch import RunWatch, Sighting, StallClock, milestones, what_a_stop_does, who_waits
from retort.config import ConfigError, RunConfig
from retort.disk import DiskFullError, writing
from retort.metrics_file import accuracy, is_validation
from retort.queues import clear_stop, load_library, request_stop

Plan = Callable[[RunConfig, Path], tuple[str, list[Program]]]
"""What `plan_programs` is: from a configuration and its file to the Redis address and the programs."""

REFRESH_S = 0.5
GRACE_S = 15.0
"""After SIGTERM a service may finish what it has in hand for so long."""
HURRY_S = 1.0
"""The same when the user does not want to wait, or the run failed."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    exit_code: int
    phase: str
    reasons: list[str] = field(default_factory=list)


def launch(config: RunConfig, resume_command: str, plan: Plan = plan_programs) -> int:
    """Run to the end and return the exit code. Whatever happens, no process is left."""
    policy = RestartPolicy(config.timeouts.max_restarts)
    with (
        writing(config.directory),
        open_run_directory(config) as config_file,
        Interrupts() as interrupts,
        Screen(Console()) as screen,
        Supervisor(policy, screen.say) as supervisor,
    ):
        url, programs = plan(config, config_file)
        run = LocalRun(config, url, supervisor, interrupts, screen)
        outcome = run.start(programs) or run.follow()
        run.stop(outcome)
        screen.close()
        run.conclude(outcome, resume_command)
    return outcome.exit_code


class LocalRun:
    """One launch of a run."""

    def __init__(
        self,
        config: RunConfig,
        redis_url: str,
        supervisor: Supervisor,
        interrupts: Interrupts,
        screen: Screen,
    ) -> None:
        self._config = config
        self._redis_url = redis_url
        self._redis = open_redis(redis_url)
        self._supervisor = supervisor
        self._interrupts = interrupts
        self._screen = screen
        self._began = time.monotonic()
        self._watch = RunWatch(config, self._redis)
        self._stall = StallClock(config.timeouts.stall_s)
        self._reached: dict[str, str] = {}
        self._stopping = False
        self._resumed_from = int(re.sub(r"\D", "", self._newest_checkpoint()) or 0)
        """Steps that earlier launches made."""

    def start(self, programs: list[Program]) -> Outcome | None:
        """Start Redis, then everything else at once. Returns an outcome if Redis did not come up."""
        self._screen.say(f"run {self._config.name} in {self._config.directory}")
        # Until then the file speaks of a launcher that has ended.
        self._write_status(Sighting(), "starting", exit_code=None)
        for program in programs:
            if program.name == "redis":
                self._supervisor.add(program)
        redis_answers = answers(self._redis_url)
        while not redis_answers():
            outcome = (
                self._judge(self._supervisor.poll()) or self._asked_to_stop(Sighting()) or self._overdue(Sighting())
            )
            if outcome:
                return outcome
            self._interrupts.wait(0.05)
        # Replicas may not, and their engines need not wait for the trainer's start.
        load_library(self._redis)
        # A request to stop that an earlier launch left behind would end this one after its first step.
        clear_stop(self._redis, self._config.key_prefix)
        self._watch.begin()
        for program in programs:
            if program.name != "redis":
                self._supervisor.add(program)
        return None

    def follow(self) -> Outcome:
        """Keep the services running and the user informed until the run ends."""
        while True:
            ending = self._supervisor.poll()
            seen = self._watch.look()
            self._tell(seen)
            outcome = self._judge(ending) or self._asked_to_stop(seen) or self._overdue(seen)
            if outcome:
                return self._explained(outcome)
            self._interrupts.wait(REFRESH_S)

    def _explained(self, outcome: Outcome) -> Outcome:
        """A stalled run ends with what `retort doctor` would say, while there is still somebody to ask."""
        if outcome.phase != "stalled":
            return outcome
        finding = diagnose(gather(self._config.directory)).line()
        return replace(outcome, reasons=[*outcome.reasons, f"retort doctor: {finding}"])

    def stop(self, outcome: Outcome) -> None:
        """Stop the services, Redis last: the others strike themselves off in it."""
        grace_s = GRACE_S if outcome.phase in ("done", "stopped") else HURRY_S
        self._screen.say("stopping the services")
        self._supervisor.stop([name for name in self._supervisor.children if name != "redis"], grace_s)
        self._supervisor.stop(list(self._supervisor.children), grace_s)
        self._write_status(self._watch.look(), outcome.phase, outcome.exit_code)

    def conclude(self, outcome: Outcome, resume_command: str) -> None:
        """Say how it went and what to do next."""
        from retort.cli.report import build_report

        for line in outcome.reasons:
            self._screen.say(line)
        accuracy = self._watch.metrics.accuracy(self._config.validation.samples)
        if accuracy:
            (_, before), (version, after) = accuracy[0], accuracy[-1]
            change = f", {after:.3f} at version {version} ({after - before:+.3f})" if len(accuracy) > 1 else ""
            self._screen.say(f"avg@{self._config.validation.samples} {before:.3f} before training{change}")
        if outcome.exit_code == 0:
            self._next_steps(build_report(self._config.directory))
        else:
            self._screen.say(f"{outcome.phase} after {self._elapsed()}. Logs: {self._config.directory / 'logs'}")
            if accuracy:
                self._screen.say(f"The report so far: {build_report(self._config.directory)}")
            self._screen.say(self._what_to_do(outcome, resume_command))

    def _what_to_do(self, outcome: Outcome, resume_command: str) -> str:
        newest = self._newest_checkpoint()
        if outcome.exit_code == ConfigError.exit_code and not newest:
            # A resumed run goes by the configuration that has just been refused.
            return f"Nothing was trained. Correct it, remove {self._config.directory} and run again."
        return f"To resume from {newest or 'the beginning (no checkpoint yet)'}: {resume_command}"

    def _next_steps(self, report: Path) -> None:
        directory = self._config.directory
        steps = self._config.trainer.steps
        made = f"{steps - self._resumed_from} steps (to {steps})" if self._resumed_from else f"{steps} steps"
        self._screen.say(f"done: {made} in {self._elapsed()}")
        self._screen.say(f"  open the report      {report}")
        self._screen.say(f"  talk to the model    {command('chat', directory)}")
        plan = command("plan", "configs/qwen3-4b-sciknoweval.toml")
        self._screen.say(f"  use 8 GPUs           {plan} (docs/reference-run.md)")

    def _judge(self, ending: Ending | None) -> Outcome | None:
        """What the end of a process means for the run."""
        if ending is None:
            return None
        log, code = ending.program.log, ending.exit_code
        if ending.program.name == "redis" and any("No space left on device" in line for line in last_lines(log, 20)):
            return Outcome(
                DiskFullError.exit_code, "disk full", [f"{ending.cause}. Its last lines ({log}):", *last_lines(log, 8)]
            )
        if ending.gave_up:
            limit = self._config.timeouts.max_restarts
            reason = f"giving up: {ending.cause}, after {limit} restarts within ten minutes. Its last lines ({log}):"
            return Outcome(1, "failed", [reason, *last_lines(log, 20)])
        if ending.program.name == "trainer" and code in (0, 130):
            return Outcome(code, "done" if code == 0 else "stopped")
        return Outcome(code, "failed", [f"{ending.cause}. Its last lines ({log}):", *last_lines(log, 8)])

    def _asked_to_stop(self, seen: Sighting) -> Outcome | None:
        """Ctrl-C once: let the trainer finish its step and save. Twice, or before there is a trainer: stop at once."""
        if self._interrupts.count >= 2 or (self._interrupts.count and not seen.progress):
            self._screen.say("stopping at once")
            return Outcome(130, "stopped at once")
        if self._interrupts.count and not self._stopping:
            try:
                request_stop(self._redis, self._config.key_prefix, "Ctrl-C")
            except RedisError:
                return None  # it is being restarted; asked again at the next look
            self._stopping = True
            what = what_a_stop_does(seen.progress.get("phase", ""), self._watch.metrics.by_step)
            self._screen.say(f"{what}; press Ctrl-C again to stop at once")
        return None

    def _overdue(self, seen: Sighting) -> Outcome | None:
        """End a run that hangs, naming who waits for whom."""
        limits = self._config.timeouts
        waiting = who_waits(seen, self._supervisor.children)
        if "weights" not in self._reached:
            if time.monotonic() - self._began > limits.startup_s:
                return Outcome(
                    4,
                    "stalled",
                    [f"not ready after {limits.startup_s:.0f} s (timeouts.startup_s): {waiting}"],
                )
        elif self._stall.stalled((seen.progress, len(self._watch.metrics.by_step)), time.monotonic()):
            return Outcome(4, "stalled", [f"no progress for {limits.stall_s:.0f} s (timeouts.stall_s): {waiting}"])
        return None

    def _tell(self, seen: Sighting) -> None:
        """Pass on what is new: lines for the user, the panel, status.json."""
        phase = STOPPING if self._stopping else seen.progress.get("phase", "starting")
        for key, text in milestones(seen, self._reachable()).items():
            if key not in self._reached:
                self._reached[key] = text
                self._screen.say(f"{text} ({time.monotonic() - self._began:.1f} s)")
        view = self._watch.view(seen, self._supervisor.children, phase)
        for line in seen.new_metrics:
            if line["step"] > 0 and not is_validation(line) and not self._screen.live:
                self._screen.say(step_line(line, view))
            measured = accuracy(line, view.samples)
            if measured is not None:
                self._screen.say(validation_line(int(line["step"]), measured, view.accuracy[0][1], view.samples))
        if seen.progress:
            self._screen.show(view)
        self._write_status(seen, phase, exit_code=None)

    def _reachable(self) -> dict[str, str]:
        """Services that accept connections; asked until they do for the first time."""
        children = self._supervisor.children
        addresses = {
            name: next(iter(children[name].program.addresses.values()))
            for name in ("redis", "reward")
            if name in children and name not in self._reached
        }
        return {name: address for name, address in addresses.items() if is_listening(address)}

    def _write_status(self, seen: Sighting, phase: str, exit_code: int | None) -> None:
        view = self._watch.view(seen, self._supervisor.children, phase)
        processes = [
            {
                "name": name,
                **identity(child.process.pid if child.process else None),
                "addresses": dict(child.program.addresses),
                "restarts": child.restarts,
                "state": child.state,
            }
            for name, child in self._supervisor.children.items()
        ]
        status = {
            "run": self._config.name,
            "phase": phase,
            "step": view.step,
            "steps": view.steps,
            "policy_version": view.policy_version,
            "waiting_for": view.waiting_for,
            "since": float(seen.progress.get("since", 0.0)),
            "updated": time.time(),
            "exit_code": exit_code,
            "launcher": identity(os.getpid()),
            "elapsed_s": time.monotonic() - self._began,
            "processes": processes,
        }
        write_status(self._config.directory, status)

    def _newest_checkpoint(self) -> str:
        """Name of the checkpoint from which a resume starts; empty: from the beginning."""
        names = [path.name for path in Path(self._config.directory / "checkpoints").glob("step-*")]
        committed = sorted(name for name in names if re.fullmatch(r"step-\d+", name))
        return committed[-1] if committed else ""

    def _elapsed(self) -> str:
        return clock(time.monotonic() - self._began)
