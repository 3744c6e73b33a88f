"""`retort task new NAME`: questions and their checker in one file, which `retort run CONFIG --task FILE` trains on."""

import argparse
import json
import os
import runpy
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from retort.cli.checker import as_type, checked_name
from retort.cli.invocation import command
from retort.config import ConfigError, RunConfig

DIRECTORY = "task"
"""In the run's directory. On the reward service's path it looks like an installed package that declares a checker."""
MODULE = "task_of_this_run"

TASK = Template('''\
"""The task `$name`: `tasks()` asks, `$type` grades. Replace both; this one suits the model of the demo."""

import random
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from services.reward.checkers import Checker, Example, Reward, Unscorable, Verdict

ELEMENTS = {"H": "hydrogen", "He": "helium", "C": "carbon", "N": "nitrogen", "O": "oxygen", "F": "fluorine",
            "Ne": "neon", "Na": "sodium", "Al": "aluminium", "S": "sulfur", "Cl": "chlorine", "K": "potassium",
            "Ca": "calcium", "Fe": "iron", "Cu": "copper", "Zn": "zinc"}
SYSTEM = "Reason inside <reasoning> tags, then give one letter inside <answer> tags."


def tasks() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The questions to train on, and others to measure by. docs/data.md says what a question may hold."""
    draw = random.Random(0)  # the same questions each time
    questions = []
    for symbol, name in [*ELEMENTS.items()] * 4:
        options = draw.sample([other for other in ELEMENTS.values() if other != name], 3)
        options.insert(draw.randrange(4), name)
        lines = "\\n".join(f"{letter}: {option}" for letter, option in zip("ABCD", options, strict=True))
        prompt = f"Which element has the symbol {symbol}?\\n\\n{lines}\\nPlease reason step by step."
        questions.append({"system": SYSTEM, "prompt": prompt, "answer": "ABCD"[options.index(name)]})
    draw.shuffle(questions)
    return questions[16:], questions[:16]


class $type(Checker):
    """Reward 1 if the last answer tag holds the answer, else 0. Put your own rule here."""

    name: ClassVar[str] = "$name"
    version: ClassVar[str] = "1"  # another one whenever any verdict may change: it is part of every result
    description: ClassVar[str] = "Compares the last answer tag with the answer."
    accepts: ClassVar[str] = "the expected text"
    examples = (Example("<answer>B</answer>", "B", 1.0), Example("B", "B", 0.0))
    deterministic: ClassVar[bool] = True
    # Without this it runs in a worker process, under limits and without a network. With it, it runs in a thread of
    # the service, faster; then its time must be linear in its input.
    quick: ClassVar[bool] = True

    def check(self, completion: str, answer: str, options: Mapping[str, str]) -> Verdict:
        if not answer:
            return Unscorable(reason="answer is empty; $name needs a text to compare with")
        tags = re.findall(r"<answer>([^<]*)</answer>", completion)
        parsed = tags[-1].strip() if tags else ""
        return Reward(
            value=1.0 if parsed == answer else 0.0,
            correct=parsed == answer,
            parsed=parsed,
            format_ok=bool(tags),
            rule="last_answer_tag",
            explanation=f"read {parsed!r}, the answer is {answer!r}",
        )
''')

TEST = Template("""\
from services.reward.checkers import Reward, Unscorable

from $name import $type, tasks


def test_no_question_is_in_both_parts() -> None:
    train, validation = ({question["prompt"] for question in part} for part in tasks())
    assert train
    assert validation - train == validation


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
    new = actions.add_parser("new", help="write a working task with its test")
    new.add_argument("name", help="its name, for example symbols")
    new.add_argument("--directory", type=Path, default=Path(), help="where to write NAME.py (default: here)")


def main(args: argparse.Namespace) -> int:
    words = {"name": checked_name(args.name), "type": as_type(args.name)}
    file, test = args.directory / f"{args.name}.py", args.directory / f"test_{args.name}.py"
    for path in (file, test):
        if path.exists():
            raise ConfigError(f"{path} is there already. Choose another name or --directory.")
    args.directory.mkdir(parents=True, exist_ok=True)
    file.write_text(TASK.substitute(words), encoding="utf-8")
    test.write_text(TEST.substitute(words), encoding="utf-8")
    print(f"{file}: questions and their checker; {test} is its test. Next:")
    print(f"  {command('run', 'configs/tiny-cpu.toml', '--task', file, '--run-dir', Path('runs', args.name))}")
    return 0


def write_task(file: Path, config: RunConfig) -> RunConfig:
    """Put the task's questions, and its checker as the reward service finds one, into the run's directory.

    Returns the configuration that names them. Raises ConfigError where the file is no task.
    """
    if config.reward.address:
        raise ConfigError(
            f"reward.address = {config.reward.address}: the checker of --task {file} is for the reward service "
            "that the run starts by itself. Leave the key out."
        )
    namespace = _namespace(file)
    checker = _checker(file, namespace)
    directory = config.directory / DIRECTORY
    package = directory / f"{MODULE}-0.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, rows in zip(("train", "validation"), _questions(file, namespace), strict=True):
        lines = (json.dumps({"data_source": checker.name, **row}, ensure_ascii=False) for row in rows)
        files[part] = directory / f"{part}.jsonl"
        files[part].write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    shutil.copyfile(file, directory / f"{MODULE}.py")
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {MODULE}\nVersion: 0\n", encoding="utf-8")
    entry = f"{checker.name} = {MODULE}:{checker.__name__}"
    (package / "entry_points.txt").write_text(f"[retort.checkers]\n{entry}\n", encoding="utf-8")
    chosen = {"checker": checker.name, **{part: str(path) for part, path in files.items()}}
    return config.model_copy(update={"data": config.data.model_copy(update=chosen)})


def python_path(directory: Path) -> Mapping[str, str]:
    """What lets the reward service find the checker of the run's task, if it has one."""
    task = directory / DIRECTORY
    theirs = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join([str(task), *filter(None, [theirs])])} if task.exists() else {}


def _namespace(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise ConfigError(f"--task {file}: no such file. `{command('task', 'new', 'NAME')}` writes one.")
    return runpy.run_path(str(file), run_name=MODULE)


def _questions(file: Path, namespace: Mapping[str, Any]) -> Sequence[Iterable[Mapping[str, Any]]]:
    if "tasks" not in namespace:
        raise ConfigError(f"{file} has no function tasks(), which returns the questions to train on and to measure by.")
    parts: Sequence[Iterable[Mapping[str, Any]]] = namespace["tasks"]()
    if not isinstance(parts, tuple) or len(parts) != 2:
        raise ConfigError(f"{file}: tasks() has to return two lists: questions to train on, and to measure by.")
    return parts


def _checker(file: Path, namespace: Mapping[str, Any]) -> Any:
    """The one checker that is defined there, and not imported."""
    found = [
        value
        for value in namespace.values()
        if isinstance(value, type) and value.__module__ == MODULE and hasattr(value, "check")
    ]
    if len(found) != 1:
        names = ", ".join(value.__name__ for value in found) or "none"
        raise ConfigError(f"{file}: it needs one checker, a class with `check`; it has {names}.")
    return found[0]
