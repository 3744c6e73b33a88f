"""The directory of a run: made once, continued with --resume, used by one launcher at a time."""

import argparse
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retort.cli import task
from retort.cli.invocation import command
from retort.config import ConfigError, RunConfig, dump_config, load_config

DRAFT = ".config.toml.part"
NOT_A_RUN = {DRAFT, task.DIRECTORY}
"""What a launcher that did not come to start its run may have left in the directory."""


def resolve_config(args: argparse.Namespace) -> RunConfig:
    """The configuration of a new run, or with --resume that of the run in the directory. Touches no file."""
    overrides = list(args.set)
    if args.run_dir:
        overrides.append(f"run_dir={args.run_dir.resolve()}")
    config = load_config(args.config, overrides)
    directory = config.directory.resolve()
    if args.resume:
        return _stored_config(config, directory, overrides)
    if directory.exists() and any(path.name not in NOT_A_RUN for path in directory.iterdir()):
        raise ConfigError(
            f"{directory} exists and is not empty. Continue that run with --resume, "
            "or start another with --run-dir DIR or --set name=NAME."
        )
    run_id = f"{config.name}-{secrets.token_hex(3)}"
    return config.model_copy(update={"run_id": run_id, "run_dir": str(directory)})


def _stored_config(config: RunConfig, directory: Path, overrides: list[str]) -> RunConfig:
    file = directory / "config.toml"
    if not file.exists():
        raise ConfigError(f"{directory} holds no run to resume (no config.toml). Leave out --resume to start one.")
    stored = load_config(file, overrides)
    if stored.name != config.name:
        raise ConfigError(f"{directory} holds the run {stored.name!r}, but the run file names {config.name!r}.")
    return stored.model_copy(update={"run_dir": str(directory)})


@contextmanager
def open_run_directory(config: RunConfig) -> Iterator[Path]:
    """Make the directory, write the resolved configuration, and hold a lock on it. Yields the file config.toml."""
    directory = config.directory
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            show = command("status", directory)
            raise ConfigError(f"{directory} is in use by another `retort run`. `{show}` shows it.") from None
        file = directory / "config.toml"
        draft = directory / DRAFT
        draft.touch(mode=0o600)  # the address of a Redis may hold its password
        draft.write_text(dump_config(config), encoding="utf-8")
        # First of all files, and at once: a launcher that is killed here leaves a run to resume, or none.
        os.replace(draft, file)
        (directory / "logs").mkdir(exist_ok=True)
        yield file
    finally:
        os.close(lock)
