"""What can be seen of a run from outside: progress and replicas in Redis, metrics in the run directory."""

import contextlib
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from redis import Redis
from redis.exceptions import RedisError

from retort.cli.panel import View, is_shown
from retort.cli.processes import Child
from retort.config import RunConfig
from retort.metrics_file import Metrics, MetricsFile
from retort.queues import Member, RunView


@dataclass(frozen=True)
class Sighting:
    """One look. What Redis did not answer is as it was at the look before."""

    progress: dict[str, str] = field(default_factory=dict)
    """The trainer's own words; empty until it has spoken in this launch."""
    members: dict[str, Member] = field(default_factory=dict)
    """Replicas that have spoken in this launch."""
    new_metrics: list[Metrics] = field(default_factory=list)

    @property
    def waiting_for(self) -> str:
        return self.progress.get("waiting_for", "")

    def serving(self) -> list[str]:
        """Replicas whose weights were verified."""
        return sorted(name for name, member in self.members.items() if member.policy_version is not None)


class RunWatch:
    """Looks at one run, from the moment of `begin`, when Redis is there and nobody else."""

    def __init__(self, config: RunConfig, redis: Redis) -> None:
        self._config = config
        self._redis = RunView(redis, config.key_prefix)
        self._before = Sighting()
        self._last = Sighting()
        self.metrics = MetricsFile(config.directory / "metrics.jsonl", keep=is_shown)
        self.metrics.read()  # what an earlier launch wrote is known, not new

    def begin(self) -> None:
        """Note what an earlier launch left in Redis: it says nothing about this one.

        It is told by what it says, not by its time: clocks can be set back.
        """
        with contextlib.suppress(RedisError):
            self._before = Sighting(self._redis.progress(), self._redis.members())

    def look(self) -> Sighting:
        progress, members = self._last.progress, self._last.members
        with contextlib.suppress(RedisError):  # it died and is being restarted; the supervisor says so
            progress, members = self._redis.progress(), self._redis.members()
        if progress.get("updated") == self._before.progress.get("updated"):
            progress = {}
        old = {member.incarnation for member in self._before.members.values()}
        members = {name: member for name, member in members.items() if member.incarnation not in old}
        self._last = Sighting(progress, members, self.metrics.read())
        return self._last

    def view(self, seen: Sighting, children: dict[str, Child], phase: str) -> View:
        """What the panel and status.json show."""
        steps = self._config.trainer.steps
        samples = self._config.validation.samples
        trained = [step for step in self.metrics.by_step if step > 0]
        since = float(seen.progress.get("since", 0.0))
        return View(
            run=self._config.name,
            steps=steps,
            step=int(seen.progress.get("step", max(trained, default=0))),
            phase=phase,
            policy_version=int(seen.progress.get("policy_version", 0)),
            waiting_for=seen.waiting_for,
            waiting_s=max(0.0, time.time() - since) if since else 0.0,
            last_step=self.metrics.by_step[max(trained)] if trained else {},
            samples=samples,
            accuracy=self.metrics.accuracy(samples),
            seconds_left=self.metrics.seconds_left(steps),
            services=[(name, child.state, child.restarts) for name, child in children.items()],
        )


def what_a_stop_does(phase: str, trained: Collection[int]) -> str:
    """What the trainer does when it is asked to stop in a phase; `trained`: steps with metrics, 0 for the start."""
    if not trained:
        return "stopping before the first step, with nothing to save"
    if phase in ("starting", "waiting for a rollout replica", "saving"):
        return "saving what is trained, then stopping"
    late = ", or leaving it out if its rollouts are late," if phase == "waiting for rollouts" else ""
    return f"finishing step {max(trained) + 1}{late or ','} then saving"


def milestones(seen: Sighting, reachable: dict[str, str]) -> dict[str, str]:
    """What has been reached on the way to the first step: a key for each, and what to tell the user.

    `reachable` maps the names of services that accept connections to their addresses. One serving replica is enough.
    """
    reached = {}
    for name, title in (("redis", "Valkey"), ("reward", "reward service")):
        if name in reachable:
            reached[name] = f"{title} ready on {reachable[name]}"
    for name, member in sorted(seen.members.items()):
        if member.state != "loading":
            reached[name] = f"{name}: engine loaded"
    if seen.progress:
        reached["trainer"] = "trainer ready"
    serving = len(seen.serving())
    if seen.progress and serving:
        reached["weights"] = f"weights verified on {serving} replica" + ("s" if serving > 1 else "")
    return reached


class StallClock:
    """Measures how long a run has made no progress."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._state: object = None
        self._since = 0.0

    def stalled(self, state: object, now: float) -> bool:
        """Whether `state` has been the same for longer than the limit; `now` in seconds of any steady clock."""
        if state != self._state:
            self._state, self._since = state, now
        return now - self._since > self._limit_s


def who_waits(seen: Sighting, children: dict[str, Child]) -> str:
    """One line that names who waits for whom."""
    trainer = f"the trainer (phase {seen.progress.get('phase', 'starting')!r}, step {seen.progress.get('step', '-')})"
    trainer += f" waits for {seen.waiting_for}" if seen.waiting_for else " has said nothing new"
    services = []
    for name, child in children.items():
        member = seen.members.get(name)
        state = f"{child.state}, {member.state}" if member else child.state
        wanting = f", waits for {member.waiting_for}" if member and member.waiting_for else ""
        services.append(f"{name} ({state}{wanting})")
    return f"{trainer}; {', '.join(services)}"
