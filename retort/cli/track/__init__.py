"""`retort track RUN_DIR --to NAME`: pass a run's metrics on to a tracker, now or while the run goes on.

Trackers are readers of the run's files. No service knows of them, and one that fails takes nothing down: what it did
not get is still in metrics.jsonl, and is passed on by the next start.
"""

import argparse
from pathlib import Path
from typing import get_args

import msgspec

from retort.cli.interrupts import Interrupts
from retort.cli.track.trackers import TRACKERS, Tracker, check_installed
from retort.config import ConfigError, RunConfig, TrackerName, load_config
from retort.metrics_file import MetricsFile, is_validation

POLL_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of the run, for example runs/tiny-cpu")
    parser.add_argument(
        "--to", required=True, choices=get_args(TrackerName), help="where to; needs the extra of its name"
    )
    parser.add_argument("--follow", action="store_true", help="go on while the run does, until SIGTERM or Ctrl-C")


def main(args: argparse.Namespace) -> int:
    """Raises ConfigError when there is no such run, MissingDependencyError when the tracker is not installed."""
    config_file = args.run_dir / "config.toml"
    if not config_file.is_file():
        raise ConfigError(f"{args.run_dir}: no run there (no config.toml). Runs are in runs/.")
    check_installed(args.to)
    config = load_config(config_file, [f"run_dir={args.run_dir}"], env={})
    with Interrupts() as interrupts:
        told = Told(config, args.to)
        while args.follow and not interrupts.count:
            told.tell()
            interrupts.wait(POLL_S)
        told.tell()
        told.close()
    return 0


class Position(msgspec.Struct):
    """How far a tracker has been told, kept in the run directory."""

    step: int = -1
    validated: int = -1
    """The last step whose validation it was told, which may stand on a line of its own, and later."""
    id: str = ""
    """The tracker's own name of the run, where it chooses one."""


class Told:
    """A tracker and its place in metrics.jsonl, which outlives this process: no line is told twice.

    A resumed run cuts the file back and repeats steps. A tracker keeps what it was told of them first.
    """

    def __init__(self, config: RunConfig, name: TrackerName) -> None:
        self._file = config.directory / "trackers" / f"{name}.json"
        self._file.parent.mkdir(exist_ok=True)
        self._position = (
            msgspec.json.decode(self._file.read_bytes(), type=Position) if self._file.exists() else Position()
        )
        self._metrics = MetricsFile(config.directory / "metrics.jsonl")
        self._tracker: Tracker = TRACKERS[name](config, self._position.id)
        self._position.id = self._tracker.id
        self._keep()

    def tell(self) -> None:
        """Pass on the lines that are new to the tracker."""
        for line in self._metrics.read():
            step, position = int(line["step"]), self._position
            if step <= (position.validated if is_validation(line) else position.step):
                continue
            self._tracker.log(step, line)
            position.step = max(position.step, step)
            if any(name.startswith("val-") for name in line):
                position.validated = max(position.validated, step)
            self._keep()

    def close(self) -> None:
        self._tracker.close()

    def _keep(self) -> None:
        unfinished = self._file.with_suffix(".unfinished")
        unfinished.write_bytes(msgspec.json.encode(self._position))
        unfinished.replace(self._file)
