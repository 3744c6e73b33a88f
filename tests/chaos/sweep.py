"""SIGKILL at boundary after boundary of a process, each in a run of its own that has to be finished all the same."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from retort.config import RunConfig
from tests.chaos.boundaries import Boundaries
from tests.chaos.forked import Forked
from tests.chaos.services_of_a_run import LONGEST_S, Services

ATTEMPTS = 3
"""Runs in which a boundary is looked for."""
POLL_S = 0.02


class TrainerSweep:
    """The trainer dies, and another one finishes its run."""

    started_later = ("trainer",)

    def __init__(self, services: Services) -> None:
        self._services = services

    def run(self, place: Path, names: Path, kill_at: str) -> list[int]:
        """The exit codes: that of the process which died, if it did, and that of the trainer which finished."""
        first = self._ending(place, names, kill_at)
        return [first] if first == 0 else [first, self._ending(place, names, "")]

    def _ending(self, place: Path, names: Path, kill_at: str) -> int:
        trainer = self._services.start("trainer", place, lambda: Boundaries(names, kill_at).of_a_trainer())
        return trainer.wait(timeout=LONGEST_S)


class ReplicaSweep:
    """The only replica dies, another one takes its name, and the trainer goes on."""

    started_later = ("trainer", "rollout-0")

    def __init__(self, services: Services) -> None:
        self._services = services

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


SWEEPS = {"trainer": TrainerSweep, "replica": ReplicaSweep}


def sweep(config: RunConfig, who: str, chosen: Sequence[str]) -> dict[str, list[int]]:
    """Kill a process at each of these boundaries: the exit codes of what died and of the trainer that finished."""
    services = Services(config, SWEEPS[who].started_later)
    process, directory = SWEEPS[who](services), services.config.directory
    codes: dict[str, list[int]] = {}
    for number, boundary in enumerate(chosen, start=1):
        for attempt in range(ATTEMPTS):
            # Replicas have seen the trainers of the runs before.
            place = _fresh_run(services, f"boundary-{number}", epoch=100 * number + 10 * attempt)
            codes[boundary] = process.run(place, directory / "passed", boundary)
            if len(codes[boundary]) > 1:
                break
    return codes


def boundaries(config: RunConfig, who: str) -> list[str]:
    """Those of an undisturbed run; of two of them, since only what each run passes can be waited for."""
    services = Services(config, SWEEPS[who].started_later)
    process = SWEEPS[who](services)
    passed = []
    for number in range(2):
        place = _fresh_run(services, "undisturbed", epoch=10 * number)
        names = services.config.directory / f"boundaries-{number}"
        assert process.run(place, names, "") == [0]
        passed.append(names.read_text().splitlines())
    return [name for name in passed[0] if name in passed[1]]


def _fresh_run(services: Services, name: str, epoch: int) -> Path:
    place = services.config.directory / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "epoch").write_text(str(epoch))
    services.redis.flushall()
    return place
