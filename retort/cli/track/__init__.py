"""`retort track RUN_DIR --to NAME`: pass a run's metrics on to a tracker, now or while the run goes on.

Trackers are readers of the run's files. No service knows of them, and one that fails takes nothing down: what it was
not told is still in metrics.jsonl, and the next start goes on there.
"""

import argparse
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import get_args

import msgspec

from retort.cli.interrupts import Interrupts
from retort.cli.track.trackers import TRACKERS, Tracker, check_installed
from retort.config import ConfigError, RunConfig, TrackerName, load_config
from retort.metrics_file import MetricsFile, is_validation

POLL_S = 1.0
CALL_S = 120.0
"""How long a tracker may take to open, to take a line, or to close. At the end of a run the launcher ends it sooner."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of the run, for example runs/tiny-cpu")
    parser.add_argument(
        "--to", required=True, choices=get_args(TrackerName), help="where to; needs the extra of its name"
    )
    parser.add_argument("--follow", action="store_true", help="go on as the run does, until Ctrl-C or SIGTERM")


def main(args: argparse.Namespace) -> int:
    """Raises ConfigError when there is no such run, MissingDependencyError when the tracker is not installed."""
    config_file = args.run_dir / "config.toml"
    if not config_file.is_file():
        raise ConfigError(f"{args.run_dir}: no run there (no config.toml). Runs are in runs/.")
    check_installed(args.to)
    config = load_config(config_file, [f"run_dir={args.run_dir}"], env={})
    with Interrupts() as interrupts, place_of(config, args.to) as file:
        follower = Follower(config, args.to, file, TRACKERS[args.to])
        while args.follow and not interrupts.count:
            follower.pass_on()
            interrupts.wait(POLL_S)
        follower.pass_on()
        follower.close()
    return 0


@contextmanager
def place_of(config: RunConfig, name: TrackerName) -> Iterator[Path]:
    """The file that says how far a tracker was told, for this process alone. Raises ConfigError if another has it."""
    file = config.directory / "trackers" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    lock = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{config.directory}: another process passes its metrics on to {name} already. "
                "End that one first, or take `trackers` out of the run file."
            ) from None
        yield file
    finally:
        os.close(lock)


class Place(msgspec.Struct):
    """How far a tracker was told."""

    step: int = -1
    validated: int = -1
    """The last step whose validation it was told: that may stand on a line of its own, after later steps."""


class Follower:
    """A tracker and its place in metrics.jsonl, which outlives this process: no step is told twice.

    A resumed run cuts the file back and repeats steps. A tracker keeps what it was told of them first. Only a process
    that is killed between telling a line and writing that down tells it again.
    """

    def __init__(
        self,
        config: RunConfig,
        name: str,
        place_file: Path,
        open_tracker: Callable[[RunConfig], Tracker],
        deadline_s: float = CALL_S,
    ) -> None:
        self._name = name
        self._deadline_s = deadline_s
        self._file = place_file
        self._place = msgspec.json.decode(place_file.read_bytes(), type=Place) if place_file.exists() else Place()
        self._metrics = MetricsFile(config.directory / "metrics.jsonl")
        with self._in_time("open"):
            self._tracker = open_tracker(config)

    def pass_on(self) -> None:
        """Tell the tracker the lines that are new to it."""
        for line in self._metrics.read():
            step, place = int(line["step"]), self._place
            if step <= (place.validated if is_validation(line) else place.step):
                continue
            with self._in_time("take a line"):
                self._tracker.log(step, line)
            place.step = max(place.step, step)
            if any(name.startswith("val-") for name in line):
                place.validated = max(place.validated, step)
            unfinished = self._file.with_suffix(".unfinished")
            unfinished.write_bytes(msgspec.json.encode(place))
            unfinished.replace(self._file)

    def close(self) -> None:
        with self._in_time("close"):
            self._tracker.close()

    @contextmanager
    def _in_time(self, what: str) -> Iterator[None]:
        """End this process when the tracker takes too long: what it waits in may not listen to an exception."""
        timer = Timer(self._deadline_s, self._give_up, [what])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self, what: str) -> None:
        print(
            f"retort track: {self._name} did not {what} within {self._deadline_s:g} s. When it answers again, "
            "`retort track` goes on where it was.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
