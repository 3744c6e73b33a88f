"""`retort checker new NAME`: a checker with its test, as a package that pip can install."""

import argparse
import importlib.util
import keyword
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from string import Template

from retort.config import ConfigError

PROJECT = Template("""\
[build-system]
requires = ["setuptools>=78"]
build-backend = "setuptools.build_meta"

[project]
name = "$dashed"
version = "0.1.0"
dependencies = ["retort[reward]"]

[project.entry-points."retort.checkers"]
$name = "$name:$type"

[tool.setuptools]
py-modules = ["$name"]
""")

CHECKER = Template('''\
"""The checker `$name`. Change `version` whenever any verdict may change: it is part of every result."""

from collections.abc import Mapping
from typing import ClassVar

from services.reward.checkers import Checker, Example, Reward, Unscorable, Verdict


class $type(Checker):
    """Reward 1 if the completion contains the answer, else 0. Put your own rule here."""

    name: ClassVar[str] = "$name"
    version: ClassVar[str] = "1"
    description: ClassVar[str] = "Looks for the answer in the completion."
    accepts: ClassVar[str] = "the expected text"
    examples = (Example("It is helium.", "helium", 1.0), Example("It is neon.", "helium", 0.0))
    deterministic: ClassVar[bool] = True
    # Without this it runs in a worker process, under limits and without a network. With it, it runs in a thread of
    # the service, faster; then its time must be linear in its input.
    quick: ClassVar[bool] = True

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        if not answer:
            return Unscorable(reason="answer is empty; $name needs the text to look for")
        correct = answer in completion
        return Reward(
            value=1.0 if correct else 0.0,
            correct=correct,
            parsed=answer if correct else "",
            format_ok=True,
            rule="contains",
            explanation=f"the answer is {'' if correct else 'not '}in the completion",
        )
''')

TEST = Template("""\
from services.reward.checkers import Reward, Unscorable

from $name import $type


def test_every_example_has_the_reward_that_it_promises() -> None:
    for example in $type.examples:
        verdict = $type().check(example.completion, example.answer, example.options or {})
        assert isinstance(verdict, Reward)
        assert verdict.value == example.reward


def test_an_empty_answer_is_unscorable() -> None:
    assert isinstance($type().check("text", "", {}), Unscorable)
""")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser("new", help="write a working checker with its test")
    new.add_argument("name", help="its name, for example shorter_than")
    new.add_argument("--directory", type=Path, help="where to write it (default: ./NAME)")


def main(args: argparse.Namespace) -> int:
    name = checked_name(args.name)
    if problem := _taken(name):
        raise ConfigError(f"{name!r} is {problem}. Choose another name.")
    directory = args.directory or Path(name)
    if directory.exists():
        raise ConfigError(f"{directory} is there already. Choose another name or --directory.")
    words = {"name": args.name, "type": as_type(args.name), "dashed": args.name.replace("_", "-")}
    directory.mkdir(parents=True)
    for file, text in (("pyproject.toml", PROJECT), (f"{args.name}.py", CHECKER), (f"test_{args.name}.py", TEST)):
        (directory / file).write_text(text.substitute(words), encoding="utf-8")
    print(f"{directory}: {args.name}.py, its test, and pyproject.toml. Next:")
    # This interpreter by its name: whichever `python` comes first on the PATH need not have the service.
    python = sys.executable
    print(f"  cd {directory} && {python} -m pip install pytest && {python} -m pytest")
    print(f"  {python} -m pip install --no-deps . && {python} -m retort.cli serve reward")
    return 0


def checked_name(name: str) -> str:
    """The name. Raises ConfigError if a checker cannot be called so."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
        raise ConfigError(f"{name!r}: a checker's name is lower-case letters, digits and _, for example my_checker.")
    return name


def as_type(name: str) -> str:
    """The class of a checker: my_checker is MyChecker."""
    return "".join(part.capitalize() for part in name.split("_"))


def _taken(name: str) -> str:
    """What has the name already; empty if nothing has."""
    if keyword.iskeyword(name):
        return "a word of Python"
    built_in = importlib.util.find_spec(f"services.reward.checkers.{name}")  # one file each
    if built_in or name in entry_points(group="retort.checkers").names:
        return "a checker that is installed"
    module = importlib.util.find_spec(name)
    # Without an origin it is no more than a directory of that name.
    return f"the name of a module, {module.origin}, that it would hide" if module and module.origin else ""
