"""Command lines that the program prints, such that they do what they say when they are pasted."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def command(*words: str | Path) -> str:
    """`retort` with these arguments, called as it was this time: `.venv/bin/retort chat runs/tiny-cpu`."""
    return shlex.join([*_program(), *map(str, words)])


def _program() -> list[str]:
    called = Path(sys.argv[0])
    if called.name == "__main__.py" and called.parent.name == "cli":
        return [_from_here(Path(sys.executable)), "-m", "retort.cli"]
    if called.name != "retort":  # part of another program, which does not say how this one is called
        return ["retort"]
    on_path = shutil.which("retort")
    if on_path and called.exists() and Path(on_path).samefile(called):
        return ["retort"]
    return [_from_here(called)]


def _from_here(file: Path) -> str:
    """The path from the working directory if it is below, else from the root. Links stay: a .venv is made of them."""
    relative = os.path.relpath(file)
    if relative.startswith(os.pardir):
        return os.path.abspath(file)
    return relative if os.sep in relative else os.path.join(os.curdir, relative)
