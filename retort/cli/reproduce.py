"""`retort reproduce NAME`: repeat a published run with its pinned run file, and say whether the result is the same.

The run file is configs/NAME.toml and what was published reference/NAME.toml. Called again it continues an interrupted
run, and only judges a finished one.
"""

import argparse
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.cli import run
from retort.cli.compare.table import Measured, Row, aligned, difference_text, has_peak, rows, value_text
from retort.cli.invocation import command
from retort.cli.prepare import TEST_FILE, TRAIN_FILE, checksum_problem
from retort.cli.published import Band, Published, read_published
from retort.cli.report.run_files import read_run
from retort.config import ConfigError, DataConfig, RunConfig, load_config

DECIDING = ("trainer", "sampling", "method", "validation")
"""Tables of the run file whose keys decide the result."""
DEPLOYMENT = {
    "ranks",
    "micro_batch_tokens",
    "share_prompts",
    "activation_checkpointing",
    "compile",
    "offload",
    "max_logprob_gap",
    "deterministic",
}
"""Keys of `trainer` that do not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="published run, for example qwen3-4b-sciknoweval")
    parser.add_argument("--config", type=Path, metavar="FILE", help="run file; default configs/NAME.toml")
    parser.add_argument("--card", type=Path, metavar="FILE", help="what was published; default reference/NAME.toml")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the run's files go; default runs/NAME")
    parser.epilog = "exit codes: 0 reproduced; 1 not reproduced; otherwise those of `retort run`"


def main(args: argparse.Namespace) -> int:
    """Raises ConfigError when run file, published numbers or questions are not there or not the right ones."""
    config_file = args.config or Path("configs", f"{args.name}.toml")
    published = read_published(args.card or Path("reference", f"{args.name}.toml"))
    pinned = load_config(config_file, env={})
    config = load_config(config_file)
    check_settings(config, pinned)
    directory = args.run_dir or config.directory
    if not is_finished(directory):
        if published.sciknoweval_domain:
            check_questions(config.data, published.sciknoweval_domain)
        resume = (directory / "config.toml").exists()
        code = run.main(argparse.Namespace(config=config_file, run_dir=args.run_dir, resume=resume, set=[], task=None))
        if code != 0:
            return code
    check_settings(load_config(directory / "config.toml", env={}), pinned)
    verdict = judge(directory, published)
    print("\n".join(verdict.lines()))
    return 0 if verdict.reproduced else 1


def is_finished(directory: Path) -> bool:
    return directory.is_dir() and read_run(directory).status.get("exit_code") == 0


def check_settings(config: RunConfig, pinned: RunConfig) -> None:
    """Raises ConfigError when a key that decides the result differs from the pinned run file."""
    ours, theirs = dict(_deciding(config)), dict(_deciding(pinned))
    wrong = [f"{key} = {ours[key]!r} instead of {value!r}" for key, value in theirs.items() if ours[key] != value]
    if wrong:
        raise ConfigError(f"this is not the pinned run: {'; '.join(wrong)}. `retort run` takes any settings.")


def check_questions(data: DataConfig, domain: str) -> None:
    """Raises ConfigError when the run's questions are not those of the published run."""
    files = {TRAIN_FILE: Path(data.train), TEST_FILE: Path(data.validation)}
    try:
        sums = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}."
    else:
        problem = checksum_problem(sums, domain)
    if problem:
        make = command("prepare", "sciknoweval", "--domain", domain)
        raise ConfigError(f"{problem} Make them with `{make}`.")


@dataclass(frozen=True)
class Verdict:
    """A run beside what was published of it."""

    published: Published
    rows: list[Row]
    """Published on the left, ours on the right."""
    last_step: int

    @property
    def reproduced(self) -> bool:
        """Whether the run has its full length and the final value of every metric with a band lies in it."""
        final = {row.metric: row.right for row in self.rows if row.which == "final"}
        inside = (_inside(band, final.get(band.metric), self.published) for band in self.published.bands)
        return self.last_step >= self.published.steps and all(inside)

    def lines(self) -> Iterator[str]:
        bands = {band.metric: band for band in self.published.bands}
        body = [self._cells(row, bands.get(row.metric) if row.which == "final" else None) for row in self.rows]
        yield from aligned([["metric", "", "published", "ours", "difference", "band", ""], *body])
        yield ""
        if self.last_step < self.published.steps:
            yield f"Not reproduced: the run has {self.last_step} of {self.published.steps} steps."
        elif self.reproduced:
            yield "Reproduced: every final value with a band lies inside it. The band is sampling error alone."
        else:
            yield "Not reproduced: a final value lies outside its band."

    def _cells(self, row: Row, band: Band | None) -> list[str]:
        name = row.metric if row.which == "final" or not has_peak(row.metric) else ""
        cells = [name, row.which, value_text(row.left), value_text(row.right), difference_text(row.difference)]
        if band is None:
            return [*cells, "", ""]
        inside = _inside(band, row.right, self.published)
        return [*cells, f"{band.low:g} to {band.high:g}", "inside" if inside else "OUTSIDE"]


def judge(directory: Path, published: Published) -> Verdict:
    """Lay a run directory beside what was published; the run may have ended early."""
    ours = read_run(directory)
    metrics = dict.fromkeys(metric for line in published.metrics for metric in line if metric != "step")
    # A band without a published value still has to be met.
    metrics |= dict.fromkeys(band.metric for band in published.bands)
    left, right = Measured(published.title, published.metrics), Measured(ours.name, ours.metrics)
    return Verdict(published, list(rows(left, right, metrics)), ours.last_step)


def _inside(band: Band, point: tuple[float, float] | None, published: Published) -> bool:
    """A value that was measured before the last step is not the final one."""
    return point is not None and point[0] >= published.steps and band.low <= point[1] <= band.high


def _deciding(config: RunConfig) -> Iterator[tuple[str, Any]]:
    yield "model.max_length", config.model.max_length
    for table in DECIDING:
        keys: Mapping[str, Any] = getattr(config, table).model_dump()
        for key, value in keys.items():
            if table != "trainer" or key not in DEPLOYMENT:
                yield f"{table}.{key}", value
