"""One run under chaos, seen from outside, and what must be the same in the end whatever happened to it."""

import hashlib
import json
import os
import signal
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import psutil
from redis import Redis
from redis.exceptions import RedisError
from safetensors import safe_open

from retort.cli.doctor import Diagnosis, diagnose, gather
from retort.cli.process_table import open_redis
from retort.config import ConfigError, RunConfig, dump_config
from retort.queues import RunView
from retort.queues.protocol import Keys
from services.trainer.admission import data_indices
from tests.chaos import forked
from tests.chaos.network import Network
from tests.e2e.launched_run import LaunchedRun

NOT_A_RESULT = ("time", "timing_s/", "perf/", "weight_sync/")
"""Metrics of how it went, not of what came out."""
REWARD_ADDRESS = "RETORT_REWARD__ADDRESS"
NO_ANSWER = (RedisError, FileNotFoundError, ValueError, StopIteration, LookupError)
"""What a look at a run may raise that has not begun, or of which something is down."""
NOT_OF_A_GROUP = ("sampled_by", "generate_seconds", "score_seconds", "began")
FORK_SERVER = threading.Lock()
"""multiprocessing asks for the ends of all processes at every start, whoever is asking for one of them meanwhile."""


class Launcher:
    """The launcher's process, with the methods of `subprocess.Popen` that `LaunchedRun` uses."""

    def __init__(
        self, context: ForkServerContext, arguments: list[str], output: Path, environment: dict[str, str]
    ) -> None:
        with FORK_SERVER:
            self._process = forked.start_in_fork_server(context, forked.launch, arguments, output, environment)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int:
        return int(self.poll() or 0)

    def poll(self) -> int | None:
        with FORK_SERVER:
            return self._process.exitcode

    def wait(self) -> None:
        wait_until(lambda: self.poll() is not None, "the end of a launcher")

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class ChaosRun(LaunchedRun):
    """A run directory and the launcher that works on it, forked."""

    def __init__(self, directory: Path, config: RunConfig, context: ForkServerContext) -> None:
        super().__init__(directory)
        self.config = config.model_copy(update={"run_dir": str(directory)})
        self._context = context
        self._clients: dict[str, Redis] = {}
        self._file = directory.parent / f"{directory.name}.toml"
        self._file.write_text(dump_config(self.config))
        self._clock = directory.parent / f"{directory.name}.clock"
        self.jump_to(0.0)
        self._audited: dict[str, int] = {}
        self.is_closed = False

    @cached_property
    def network(self) -> Network:
        """The links between its services."""
        replicas = [f"rollout-{number}" for number in range(self.config.rollout.replicas)]
        targets = {f"{name} redis": partial(self._address, "redis") for name in ("trainer", *replicas)}
        targets |= {f"{name} reward": partial(self._address, "grpc") for name in replicas}
        return Network(targets)

    def start(self, *arguments: str, **settings: object) -> None:
        options = [f"--set={key.replace('__', '.')}={value}" for key, value in settings.items()]
        self.launcher = Launcher(  # type: ignore[assignment]
            self._context,
            ["run", str(self._file), "--run-dir", str(self.directory), *arguments, *options],
            self.output,
            {"PYTHONUNBUFFERED": "1", forked.CLOCK: str(self._clock), forked.LINKS: json.dumps(self._links())},
        )

    def close(self) -> None:
        """End what is left of it."""
        if hasattr(self, "launcher") and self.launcher.poll() is None:
            self.launcher.kill()
            self.launcher.wait()
        if "network" in self.__dict__:
            self.network.close()
        self.is_closed = True

    def resume(self, **settings: object) -> None:
        """`--resume`, as somebody would type it after the launcher is gone."""
        self.launcher.wait()
        has_begun = (self.directory / "config.toml").exists()
        self.start(*(["--resume"] if has_begun else []), **settings)

    def _links(self) -> dict[str, dict[str, str]]:
        told: dict[str, dict[str, str]] = {}
        for link, port in self.network.ports.items():
            service, _, other = link.partition(" ")
            address = f"127.0.0.1:{port}"
            variable = {"RETORT_REDIS__URL": f"redis://{address}/0"} if other == "redis" else {REWARD_ADDRESS: address}
            told.setdefault(service, {}).update(variable)
        return told

    def _address(self, protocol: str) -> str:
        """Where a service of the run listens now."""
        addresses = [p["addresses"][protocol] for p in self.status()["processes"] if protocol in p["addresses"]]
        return str(addresses[0])

    def jump_to(self, offset_s: float) -> None:
        """Set the clock of all of the run's processes to the right time and `offset_s`."""
        with self._clock.open("r+b" if self._clock.exists() else "wb") as file:
            file.write(struct.pack("d", offset_s))

    def now(self) -> float:
        """The time as the run's processes have it."""
        return time.time() + float(struct.unpack("d", self._clock.read_bytes())[0])

    def diagnosis(self) -> Diagnosis:
        """What `retort doctor` says."""
        return diagnose(replace(gather(self.directory), now=self.now()))

    def doctor(self) -> str:
        """What it prints; before the first status of the run that is an error. Raises before there is a run."""
        (self.directory / "config.toml").stat()
        try:
            return self.diagnosis().line()
        except ConfigError as error:
            return str(error)

    def pid_of(self, name: str) -> int | None:
        """The present process of a service; None while it has none, or while only an earlier launcher has written."""
        try:
            status = self.status()
            if status["launcher"]["pid"] != self.launcher.pid:
                return None
            return next((p["pid"] for p in status["processes"] if p["name"] == name), None)
        except FileNotFoundError:
            return None

    def redis(self) -> Redis:
        """A client that tells at once when nobody answers."""
        address = self._address("redis")
        if address not in self._clients:
            self._clients[address] = open_redis(f"redis://tester:any@{address}/0")
        return self._clients[address]

    @property
    def run_id(self) -> str:
        return next(
            line.partition('"')[2].rstrip('"\n')
            for line in (self.directory / "config.toml").read_text().splitlines()
            if line.startswith("run_id")
        )

    def view(self) -> RunView:
        return RunView(self.redis(), self.run_id)

    def epoch(self) -> int:
        """Of the newest trainer."""
        file = self.directory / "epoch"
        return int(file.read_text() or 0) if file.exists() else 0

    def phase(self) -> str:
        """What the trainer says it is doing; a fault is booked under it."""
        try:
            return self.view().progress().get("phase", "starting")
        except NO_ANSWER:
            return "unknown"

    def members(self) -> dict[str, Any]:
        try:
            return dict(self.view().members())
        except NO_ANSWER:
            return {}

    def note_accepted(self) -> None:
        """Gather the trainer calls that Redis accepted since the last time, while it still knows them."""
        after = f"({next(reversed(self._audited))}" if self._audited else "-"
        try:
            reply: Any = self.redis().xrange(Keys(self.run_id)("audit"), after)
        except NO_ANSWER:
            return
        self._audited |= {entry.decode(): int(call[b"epoch"]) for entry, call in reply}

    def accepted_epochs(self) -> list[int]:
        """Of the trainer calls that Redis accepted, in its order; entry ids begin with milliseconds."""
        in_order = sorted(self._audited, key=lambda entry: [int(part) for part in entry.split("-")])
        return [self._audited[entry] for entry in in_order]

    def admitted(self, steps: int) -> Counter[str]:
        """The groups that these steps ask for."""
        trainer = self.config.trainer
        num_questions = len(Path(self.config.data.train).read_text().splitlines())
        plan = partial(
            data_indices,
            num_questions=num_questions,
            groups_per_step=trainer.groups_per_step,
            seed=self.config.seed,
        )
        steps_plan = [plan(step) for step in range(1, steps + 1)]
        return Counter(f"{epoch}-{index:06d}" for epoch, indices in steps_plan for index in indices)

    def results(self) -> dict[str, str]:
        """SHA-256 of everything that must come out the same, by what it is."""
        steps = self.config.trainer.steps
        checkpoint = self.directory / "checkpoints" / f"step-{steps:06d}"
        tensors = {kind: hashlib.sha256() for kind in ("policy", "teacher", "exp_avg", "exp_avg_sq", "exported")}
        for file in sorted(checkpoint.glob("rank-*.safetensors")):
            with safe_open(file, "pt") as shard:
                for name in sorted(shard.keys()):
                    tensors[name.partition(".")[0]].update(name.encode() + shard.get_tensor(name).numpy().tobytes())
        with safe_open(self.directory / "hf" / "model.safetensors", "pt") as exported:
            for name in sorted(exported.keys()):
                tensors["exported"].update(name.encode() + exported.get_tensor(name).numpy().tobytes())
        return {
            **{kind: digest.hexdigest() for kind, digest in tensors.items()},
            "metrics": _sha(_results_of(self.metrics())),
            "groups": _sha([{k: v for k, v in group.items() if k not in NOT_OF_A_GROUP} for group in self.groups()]),
        }

    def check_exactly_once(self) -> None:
        """Groups admitted = groups trained, as sets and as counts, from the run's own files."""
        steps = self.config.trainer.steps
        assert [line["step"] for line in self.metrics()] == list(range(steps + 1))
        assert Counter(group["group_id"] for group in self.groups()) == self.admitted(steps)
        for group in self.groups():
            for rollout in group["rollouts"]:
                assert set(rollout["policy_versions"]) == {group["step"] - 1}, group["group_id"]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.pid == self.launcher.pid or process.status() == psutil.STATUS_ZOMBIE:
                return False
            return process.cwd().startswith(str(self.directory))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


def _results_of(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for line in lines:
        yield {name: value for name, value in line.items() if not name.startswith(NOT_A_RESULT)}


def _sha(values: Any) -> str:
    return hashlib.sha256(json.dumps(list(values), sort_keys=True).encode()).hexdigest()


def wait_until(condition: Any, what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.02)
