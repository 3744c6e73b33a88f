"""SIGKILL at boundary after boundary of a process, each in a run of its own that has to be finished all the same."""

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from retort.config import RunConfig, dump_config
from tests.chaos import forked
from tests.chaos.boundaries import Boundaries
from tests.chaos.forked import Forked
from tests.chaos.services_of_a_run import LONGEST_S, Services

ATTEMPTS = 10
"""Runs in which a boundary is looked for: what is done by the clock, signs of life for example, is not in each."""
POLL_S = 0.02


class Sweep(ABC):
    """Runs in one of which after the other a process dies."""

    @abstractmethod
    def run(self, place: Path, names: Path, kill_at: str) -> list[int]:
        """The exit codes: that of the process which died, if it did, and that of the one which finished the run.

        The names of the boundaries that it passed go into the file `names`.
        """

    @abstractmethod
    def fresh_run(self, name: str, epoch: int) -> Path:
        """The directory of a run that has not begun."""


class ServiceSweep(Sweep):
    """Redis and the other services are there all the time."""

    started_later = ("trainer",)

    def __init__(self, config: RunConfig) -> None:
        self._services = Services(config, self.started_later)

    def fresh_run(self, name: str, epoch: int) -> Path:
        place = self._services.config.directory / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "epoch").write_text(str(epoch))
        self._services.redis.flushall()
        return place


class TrainerSweep(ServiceSweep):
    """The trainer dies, and another one finishes its run."""

    def run(self, place: Path, names: Path, kill_at: str) -> list[int]:
        first = self._ending(place, names, kill_at)
        return [first] if first == 0 else [first, self._ending(place, names, "")]

    def _ending(self, place: Path, names: Path, kill_at: str) -> int:
        trainer = self._services.start("trainer", place, lambda: Boundaries(names, kill_at).of_a_trainer())
        return trainer.wait(timeout=LONGEST_S)


class ReplicaSweep(ServiceSweep):
    """The only replica dies, another one takes its name, and the trainer goes on."""

    started_later = ("trainer", "rollout-0")

    def run(self, place: Path, names: Path, kill_at: str) -> list[int]:
        replica = self._replica(place, names, kill_at)
        trainer = self._services.start("trainer", place)
        codes = []
        deadline = time.monotonic() + LONGEST_S
        while trainer.poll() is None and time.monotonic() < deadline:
            if replica.poll() is not None:
                codes.append(replica.returncode)
                replica = self._replica(place, names, "")
            time.sleep(POLL_S)
        replica.kill()
        replica.wait()
        return [*codes, trainer.wait(timeout=0)]

    def _replica(self, place: Path, names: Path, kill_at: str) -> Forked:
        return self._services.start("rollout-0", place, lambda: Boundaries(names, kill_at).of_a_replica())


class LauncherSweep(Sweep):
    """The launcher dies, and with it all that it has started; `--resume` finishes the run."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        config.directory.mkdir()
        self._clock = config.directory / "clock"
        self._clock.write_bytes(bytes(8))

    def fresh_run(self, name: str, epoch: int) -> Path:
        place = self._config.directory / name
        shutil.rmtree(place, ignore_errors=True)
        return place

    def run(self, place: Path, names: Path, kill_at: str) -> list[int]:
        first = self._ending(place, names, kill_at)
        return [first] if first == 0 else [first, self._ending(place, names, "")]

    def _ending(self, place: Path, names: Path, kill_at: str) -> int:
        file = place.with_name(f"{place.name}.toml")
        file.write_text(dump_config(self._config))
        resume = ["--resume"] if (place / "config.toml").exists() else []
        launcher = forked.fork_launcher(
            ["run", str(file), "--run-dir", str(place), *resume],
            place.with_name(f"{place.name}.log"),
            {"PYTHONUNBUFFERED": "1", forked.CLOCK: str(self._clock), forked.LINKS: "{}"},
            lambda: Boundaries(names, kill_at).of_a_launcher(place),
        )
        return launcher.wait(timeout=LONGEST_S)


SWEEPS: dict[str, type[Sweep]] = {"trainer": TrainerSweep, "replica": ReplicaSweep, "launcher": LauncherSweep}


def sweep(config: RunConfig, who: str, chosen: Sequence[str]) -> dict[str, list[int]]:
    """Kill a process at each of these boundaries: the exit codes of what died and of what finished."""
    process, directory = SWEEPS[who](config), config.directory
    codes: dict[str, list[int]] = {}
    for number, boundary in enumerate(chosen, start=1):
        for attempt in range(ATTEMPTS):
            # Replicas have seen the trainers of the runs before.
            place = process.fresh_run(f"boundary-{number}", epoch=100 * number + 10 * attempt)
            codes[boundary] = process.run(place, directory / "passed", boundary)
            if len(codes[boundary]) > 1:
                break
    return codes


def boundaries(config: RunConfig, who: str) -> list[str]:
    """Those of an undisturbed run; of two of them, since only what each run passes can be waited for."""
    process = SWEEPS[who](config)
    passed = []
    for number in range(2):
        place = process.fresh_run("undisturbed", epoch=10 * number)
        names = config.directory / f"boundaries-{number}"
        assert process.run(place, names, "") == [0]
        passed.append(names.read_text().splitlines())
    return [name for name in passed[0] if name in passed[1]]
