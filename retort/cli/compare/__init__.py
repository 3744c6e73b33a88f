"""`retort compare RUN_A RUN_B`: two runs side by side, or a run beside a published one."""

import argparse
from pathlib import Path

from retort.cli.compare.overlay import render
from retort.cli.compare.table import Measured, aligned, compared_metrics, difference_text, rows, value_text
from retort.cli.published import read_published
from retort.cli.report.run_files import read_run
from retort.config import ConfigError

PAGE = Path("compare.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    meaning = "directory of a run, or the file of a published one, for example reference/qwen3-4b-sciknoweval.toml"
    parser.add_argument("left", type=Path, metavar="RUN_A", help=meaning)
    parser.add_argument("right", type=Path, metavar="RUN_B", help="the same; differences are B - A")
    parser.add_argument("--html", action="store_true", help=f"write {PAGE} with both sides' curves besides")


def main(args: argparse.Namespace) -> int:
    """Raises ConfigError when a side is neither."""
    left, right = read_measured("A", args.left), read_measured("B", args.right)
    metrics = compared_metrics(left, right)
    if not metrics:
        raise ConfigError(f"neither {args.left} nor {args.right} has a metric to compare yet.")
    table = list(rows(left, right, metrics))
    head = ["metric", "", left.name, right.name, "B - A"]
    body = [
        [row.metric if row.which == "final" else "", row.which, value_text(row.left), value_text(row.right), change]
        for row in table
        for change in [difference_text(row.difference)]
    ]
    print("\n".join(aligned([head, *body])))
    if args.html:
        PAGE.write_text(render(left, right, table), encoding="utf-8")
        print(PAGE)
    return 0


def read_measured(side: str, path: Path) -> Measured:
    """Called after its directory, since two runs of one run file have the same name."""
    if path.suffix == ".toml":
        published = read_published(path)
        return Measured(f"{side}: {published.title}", published.metrics)
    return Measured(f"{side}: {path.resolve().name}", read_run(path).metrics)
