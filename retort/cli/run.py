"""`retort run CONFIG`: the local launcher. One command trains, from the run file to the report."""

import argparse
from pathlib import Path

from retort.cli import preflight
from retort.cli.invocation import command
from retort.cli.run_directory import resolve_config
from retort.cli.task import write_task
from retort.config import ConfigError
from retort.unpickling import refuse_unpickling

EXIT_CODES = """\
exit codes: 0 done; 1 a service died too often; 2 bad configuration; 3 missing dependency; 4 stalled; 5 diverged;
130 after Ctrl-C. Ctrl-C once finishes the step and saves, twice stops at once; --resume continues.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXIT_CODES
    parser.add_argument("config", type=Path, metavar="CONFIG", help="run file, for example configs/tiny-cpu.toml")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the run's files go; default runs/NAME")
    parser.add_argument(
        "--task", type=Path, metavar="FILE", help="train on its questions with its checker: retort task new NAME"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in that directory")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key of the run file",
    )


def main(args: argparse.Namespace) -> int:
    if args.task and args.resume:
        raise ConfigError(f"--task {args.task}: a resumed run keeps the task that it began with. Leave it out.")
    config = resolve_config(args)
    if args.task:
        config = write_task(args.task, config)
    preflight.check(config)
    # Only now: this needs redis, psutil and rich, and preflight says what to do where they are missing.
    from retort.cli.launch import launch

    refuse_unpickling()
    return launch(config, resume_command(args, config.directory))


def resume_command(args: argparse.Namespace, directory: Path) -> str:
    """What to type to continue this run."""
    # The run's own config.toml always leads back to it; the user's file does unless the command line said otherwise.
    elsewhere = args.run_dir or any(item.partition("=")[0].strip() in ("name", "run_dir") for item in args.set)
    return command("run", directory / "config.toml" if elsewhere else args.config, "--resume")
