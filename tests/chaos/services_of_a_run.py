"""The services of a run without a launcher, for tests that have to decide themselves who lives when."""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from redis import Redis

from retort.cli.process_table import open_redis, plan_programs
from retort.cli.processes import Program
from retort.config import RunConfig, dump_config, load_config
from tests.chaos import forked
from tests.chaos.boundaries import Boundaries
from tests.chaos.run import wait_until

FENCED = 2
LONGEST_S = 400.0
"""For the end of a trainer; on a machine that has other work a run of seconds takes minutes."""
ATTEMPTS = 3
"""Runs in which a boundary is looked for."""


class Services:
    """Redis, the reward service and replicas, started; trainers are started one by one."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        (config.directory / "logs").mkdir(parents=True)
        file = config.directory / "config.toml"
        file.write_text(dump_config(config))
        url, programs = plan_programs(config, file)
        forked.let_testers_in(config)
        self.redis: Redis = open_redis(f"redis://tester:any@{url.rpartition('@')[2]}")
        self._programs = {program.name: program for program in programs}
        for name in [name for name in self._programs if name != "trainer"]:
            forked.spawn(self._programs[name])
            if name == "redis":
                wait_until(self._programs["trainer"].may_start, "Redis")

    def trainer(self, directory: Path | None = None, before: Callable[[], None] | None = None) -> forked.Forked:
        """One more trainer of this run, or of another directory. `before` is called in its process."""
        program = self._programs["trainer"]
        return forked.fork("trainer", program.command, *self._place(program, directory), before)

    def _place(self, program: Program, directory: Path | None) -> tuple[dict[str, str], Path]:
        environment = dict(program.environment)
        if directory is None:
            return environment, program.log
        (directory / "logs").mkdir(parents=True, exist_ok=True)
        environment["RETORT_RUN_DIR"] = str(directory)
        return environment, directory / "logs" / "trainer.log"

    def accepted(self, after: str = "-") -> list[tuple[str, int, str]]:
        entries = self.redis.xrange(f"retort:{{{self.config.key_prefix}}}:audit", after)
        return [(entry.decode(), int(call[b"epoch"]), call[b"call"].decode()) for entry, call in entries]


def in_a_process_of_its_own(work: Callable[..., object], config_file: str, output: Path, *arguments: object) -> None:
    """Runs `work(services, *arguments)` and leaves its result, as JSON, beside `output`."""
    os.setsid()
    forked.be_like_a_started_program()
    forked.redirect(output)
    forked.shorten_waits()
    config = load_config(config_file)
    result = work(Services(config), *arguments)
    output.with_suffix(".json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # what was started dies with it


def take_over_again_and_again(services: Services, seed: int, times: int) -> dict[str, object]:
    """Freeze the trainer, start its successor, wake it up: each time it must end without having changed anything."""
    chance = random.Random(seed)
    epoch_file = services.config.directory / "epoch"
    trainer = services.trainer()
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
        successor = services.trainer()
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


def sweep(services: Services, share: float, seed: int) -> dict[str, object]:
    """Kill the trainer at boundary after boundary, each in a run of its own, and let another trainer finish it."""
    directory = services.config.directory
    names = directory / "boundaries"
    _fresh_run(services, directory / "undisturbed", epoch=0)
    assert _ending(services, directory / "undisturbed", names, "") == 0
    boundaries = names.read_text().splitlines()
    chosen = _some(boundaries, share, seed)
    codes: dict[str, list[int]] = {}
    for number, boundary in enumerate(chosen, start=1):
        place = directory / f"boundary-{number}"
        for attempt in range(ATTEMPTS):
            # Replicas have seen the trainers of the runs before.
            _fresh_run(services, place, epoch=100 * number + 10 * attempt)
            first = _ending(services, place, directory / "passed", boundary)
            if first != 0:
                codes[boundary] = [first, _ending(services, place, directory / "passed", "")]
                break
        else:
            codes[boundary] = []  # never passed there again
    return {"boundaries": len(boundaries), "codes": codes}


def _some(boundaries: Sequence[str], share: float, seed: int) -> list[str]:
    count = max(1, round(share * len(boundaries)))
    chosen = set(random.Random(seed).sample(range(len(boundaries)), count))
    return [boundary for index, boundary in enumerate(boundaries) if index in chosen]


def _fresh_run(services: Services, place: Path, epoch: int) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "epoch").write_text(str(epoch))
    services.redis.flushall()


def _ending(services: Services, place: Path, names: Path, kill_at: str) -> int:
    trainer = services.trainer(place, lambda: Boundaries(names, kill_at).install())
    return trainer.wait(timeout=LONGEST_S)


def with_run_id(config: RunConfig, directory: Path) -> RunConfig:
    return config.model_copy(update={"run_dir": str(directory), "run_id": "chaos"})
