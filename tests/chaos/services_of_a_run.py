"""The services of a run without a launcher, for tests that have to decide themselves who lives when."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from redis import Redis

from retort.cli.process_table import open_redis, plan_programs
from retort.config import RunConfig, dump_config, load_config
from tests.chaos import forked
from tests.chaos.run import wait_until

FENCED = 2
LONGEST_S = 400.0
"""For the end of a trainer; on a machine that has other work a run of seconds takes minutes."""
LONGEST_SESSION_S = 5 * 3600.0


class Services:
    """Redis, the reward service and replicas, started; what a test starts itself, it starts one by one."""

    def __init__(self, config: RunConfig, started_later: Collection[str] = ("trainer",)) -> None:
        self.config = config
        (config.directory / "logs").mkdir(parents=True)
        file = config.directory / "config.toml"
        file.write_text(dump_config(config))
        url, programs = plan_programs(config, file)
        forked.let_testers_in(config)
        self.redis: Redis = open_redis(f"redis://tester:any@{url.rpartition('@')[2]}")
        self._programs = {program.name: program for program in programs}
        for name in [name for name in self._programs if name not in started_later]:
            forked.spawn(self._programs[name])
            if name == "redis":
                wait_until(self._programs["trainer"].may_start, "Redis")

    def start(
        self, name: str = "trainer", directory: Path | None = None, before: Callable[[], None] | None = None
    ) -> forked.Forked:
        """One more trainer or replica of this run, or of another directory. `before` is called in its process."""
        program = self._programs[name]
        place = directory or self.config.directory
        (place / "logs").mkdir(parents=True, exist_ok=True)
        environment = {**program.environment, "RETORT_RUN_DIR": str(place)}
        return forked.fork(name, forked.command_of(program), environment, place / "logs" / f"{name}.log", before)

    def accepted(self, after: str = "-") -> list[tuple[str, int, str]]:
        entries = self.redis.xrange(f"retort:{{{self.config.key_prefix}}}:audit", after)
        return [(entry.decode(), int(call[b"epoch"]), call[b"call"].decode()) for entry, call in entries]


def begin(work: Callable[..., object], config: RunConfig, directory: Path, context: Any, *arguments: object) -> Any:
    """Start `work(config, *arguments)` in a process of its own, with a run in that directory."""
    directory.mkdir(exist_ok=True)
    file = directory / "config.toml"
    file.write_text(dump_config(config.model_copy(update={"run_dir": str(directory / "run"), "run_id": "chaos"})))
    output = directory / "output.log"
    return forked.start_in_fork_server(context, in_a_process_of_its_own, work, str(file), output, *arguments)


def outcome_of(process: Any, directory: Path) -> Any:
    """What the work answered. Its logs, and those of its services, are printed."""
    process.join(LONGEST_SESSION_S)
    output = directory / "output.log"
    logs = [output, *(directory / "run" / "logs").glob("*.log")]
    print("\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in logs))
    assert process.exitcode == 0
    return json.loads(output.with_suffix(".json").read_text())


def in_a_process_of_its_own(work: Callable[..., object], config_file: str, output: Path, *arguments: object) -> None:
    """Runs `work(config, *arguments)` and leaves its result, as JSON, beside `output`."""
    os.setsid()
    forked.be_like_a_started_program()
    forked.redirect(output)
    forked.shorten_waits()
    result = work(load_config(config_file), *arguments)
    output.with_suffix(".json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # what was started dies with it


def take_over_again_and_again(config: RunConfig, seed: int, times: int) -> dict[str, object]:
    """Freeze the trainer, start its successor, wake it up: each time it must end without having changed anything."""
    services = Services(config)
    chance = random.Random(seed)
    epoch_file = services.config.directory / "epoch"
    trainer = services.start()
    frozen_in: list[str] = []
    codes = []
    for _ in range(times):
        wait_until(lambda: _epoch(epoch_file), "a trainer that has taken over")
        time.sleep(chance.uniform(0.0, 2.5))
        if trainer.poll() is not None:
            break
        before = _epoch(epoch_file)
        os.kill(trainer.pid, signal.SIGSTOP)
        if _is_over(services):
            os.kill(trainer.pid, signal.SIGCONT)  # nothing is left that it could be refused
            break
        frozen_in.append(_phase(services))
        successor = services.start()
        deadline = time.monotonic() + 10
        while _epoch(epoch_file) == before and time.monotonic() < deadline:
            time.sleep(0.02)  # it does not come where the frozen one holds the lock
        time.sleep(chance.uniform(0.0, 1.0))
        os.kill(trainer.pid, signal.SIGCONT)
        codes.append(trainer.wait(timeout=LONGEST_S))
        trainer = successor
    last = trainer.wait(timeout=LONGEST_S)
    return {"zombies": codes, "last": last, "frozen in": frozen_in, "accepted": services.accepted()}


def _epoch(file: Path) -> int:
    return int(file.read_text()) if file.exists() else 0


def _is_over(services: Services) -> bool:
    """Whether the last checkpoint is there: a trainer may end well from here, whoever came after it."""
    last = f"step-{services.config.trainer.steps:06d}"
    return (services.config.directory / "checkpoints" / last).exists()


def _phase(services: Services) -> str:
    phase = services.redis.hget(f"retort:{{{services.config.key_prefix}}}:progress", "phase")
    return phase.decode() if phase else "starting"
