"""`retort report RUN_DIR`: one self-contained page about a run, finished or not."""

import argparse
import webbrowser
from pathlib import Path

from retort.cli.report.completions import Detail
from retort.cli.report.page import render
from retort.cli.report.run_files import Run, read_run

MAX_BYTES = 5_000_000
DETAILS = (Detail(256, 800, 32), Detail(256, 200, 16), Detail(256, 60, 8), Detail(48, 60, 8), Detail(12, 50, 2))
"""The first that keeps the page under MAX_BYTES is used."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of the run, for example runs/tiny-cpu")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def main(args: argparse.Namespace) -> int:
    """Write the page and say where it is. Raises ConfigError when there is no such run."""
    page = build_report(args.run_dir)
    print(page)
    if args.open:
        webbrowser.open(page.resolve().as_uri())
    return 0


def build_report(run_dir: Path) -> Path:
    """Write `report.html` into the run directory and return its path.

    Works on a run that goes on or that failed early: what is missing is left out. Raises ConfigError when there is
    no such directory.
    """
    run = read_run(run_dir)
    page = run_dir / "report.html"
    draft = page.with_suffix(".html.part")
    draft.write_bytes(page_of(run))
    draft.replace(page)
    return page


def page_of(run: Run, stamp: str = "") -> bytes:
    """The page, at most MAX_BYTES long. `stamp`: as in `render`."""
    for detail in DETAILS:
        # A broken surrogate that a model wrote cannot be encoded; a question mark stands in for it.
        content = render(run, detail, stamp).encode("utf-8", errors="replace")
        if len(content) <= MAX_BYTES:
            break
    return content
