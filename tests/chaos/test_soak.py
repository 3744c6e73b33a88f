"""`make soak`: 2,000 steps, and what the memory of every process and of Redis does meanwhile."""

import os
import statistics
import threading
from pathlib import Path

import pytest
from redis.exceptions import RedisError

from tests.chaos.conftest import MakeRun
from tests.chaos.run import ChaosRun

STEPS = int(os.environ.get("RETORT_SOAK_STEPS", "2000"))
pytestmark = [pytest.mark.soak, pytest.mark.timeout(4 * 3600)]
SETTLED = 0.4
"""Caches, allocators and the garbage collector have found their size in this part of the run."""
MAX_SLOPE_MIB = 4.0
"""Growth in 1,000 steps. A step's groups (0.02 MiB) kept for ever would be 20; the mean of noise is below 1."""
EVERY_S = 0.5


def anonymous(pid: int) -> int:
    """Bytes of a process that lie in memory and in no file.

    Not those that it shares with nobody: of what forked processes share, they grow whenever another one ends.
    """
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


class Memory:
    """Looks at a run again and again: (step, MiB) for every process, and for what Redis says it uses."""

    def __init__(self, run: ChaosRun) -> None:
        self._run = run
        self._over = threading.Event()
        self.seen: dict[str, list[tuple[int, float]]] = {}

    def watch(self) -> None:
        while not self._over.wait(EVERY_S):
            try:
                self._look()
            except (OSError, ValueError, LookupError, RedisError):
                continue  # the run begins or ends at this moment

    def stop(self) -> None:
        self._over.set()

    def _look(self) -> None:
        step = self._run.status()["step"]
        pids = {process["name"]: process["pid"] for process in self._run.status()["processes"]}
        for name, pid in {"launcher": self._run.launcher.pid, **pids}.items():
            self._note(name, step, anonymous(pid))
        self._note("redis, used_memory", step, self._run.redis().info("memory")["used_memory"])

    def _note(self, name: str, step: int, size: int) -> None:
        self.seen.setdefault(name, []).append((step, size / 2**20))


def slope(points: list[tuple[int, float]]) -> float:
    """MiB per 1,000 steps, by least squares over the settled part."""
    settled = [point for point in points if point[0] >= SETTLED * STEPS]
    steps, sizes = zip(*settled, strict=True)
    return 1000 * statistics.linear_regression(steps, sizes).slope


def test_memory_is_flat_over_2000_steps(chaos_config, make_run: MakeRun, tmp_path: Path) -> None:
    # Deterministic order and files as ever; checkpoints and validations often enough to count.
    # The deadlines are a busy machine's.
    config = chaos_config(
        STEPS,
        validation={"every": 100},
        checkpoint={"every": 20},
        rollout={"lease_s": 60.0},
        weight_sync={"deadline_s": 120.0},
        timeouts={"startup_s": 900, "stall_s": 900},
    )
    run = make_run(config)
    memory = Memory(run)
    watching = threading.Thread(target=memory.watch, name="memory")
    run.start()
    watching.start()
    try:
        assert run.finish(3.5 * 3600) == 0, run.tails()
    finally:
        memory.stop()
        watching.join()
    run.check_exactly_once()
    slopes = {name: slope(points) for name, points in memory.seen.items()}
    for name, points in memory.seen.items():
        last = statistics.mean(size for _, size in points[-20:])
        print(f"{name:<20} {last:8.1f} MiB at the end  {slopes[name]:+7.2f} MiB per 1,000 steps")
    assert set(slopes) == {"launcher", "redis", "reward", "rollout-0", "rollout-1", "trainer", "redis, used_memory"}
    assert {name: value for name, value in slopes.items() if value > MAX_SLOPE_MIB} == {}
