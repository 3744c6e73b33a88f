"""`retort task new`: what it writes is a task as it stands, and `retort run --task` makes a run of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retort.cli.__main__ import main
from retort.cli.task import python_path, write_task
from retort.config import ConfigError, RunConfig, load_config
from retort.questions import questions_of

ROOT = Path(__file__).parents[3]
SCORE = """
from importlib.metadata import entry_points
from services.reward.discovery import GROUP, load_checkers
verdict = load_checkers(entry_points(group=GROUP))["symbols"].check("<answer>B</answer>", "B", {})
print(verdict.value, verdict.parsed)
"""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(ROOT / "configs" / "tiny-cpu.toml", [f"run_dir={tmp_path / 'run'}"], env={})


@pytest.fixture
def task(tmp_path: Path) -> Path:
    assert main(["task", "new", "symbols", "--directory", str(tmp_path)]) == 0
    return tmp_path / "symbols.py"


def python(*words: str, cwd: Path, **environment: str) -> str:
    path = os.pathsep.join([*filter(None, [environment.pop("PYTHONPATH", "")]), str(ROOT)])
    command = [sys.executable, *words]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_test_of_a_new_task_passes(task: Path) -> None:
    assert "3 passed" in python("-m", "pytest", "-p", "no:cacheprovider", "test_symbols.py", cwd=task.parent)


def test_a_run_of_a_new_task_has_its_questions(task: Path, config: RunConfig) -> None:
    train, validation = questions_of(write_task(task, config))
    assert (len(train), len(validation)) == (48, 16)
    assert {question.data_source for question in [*train, *validation]} == {"symbols"}
    [first] = [question for question in train if question.index == 0]
    assert first.answer in "ABCD"
    assert "Which element has the symbol" in first.messages[-1]["content"]


def test_the_reward_service_of_the_run_finds_the_checker_and_no_other_service_does(
    task: Path, config: RunConfig, tmp_path: Path
) -> None:
    assert python_path(config.directory) == {}
    assert write_task(task, config).data.checker == "symbols"
    path = python_path(config.directory)
    assert python("-c", SCORE, cwd=tmp_path, **path) == "1.0 B\n"


def test_what_is_no_task_is_refused_in_words(task: Path, config: RunConfig, tmp_path: Path) -> None:
    def refusal(text: str) -> str:
        file = tmp_path / "broken.py"
        file.write_text(text)
        with pytest.raises(ConfigError) as raised:
            write_task(file, config)
        return str(raised.value)

    code = task.read_text()
    assert "needs one checker, a class with `check`; it has none" in refusal("def tasks(): return [], []")
    assert "has no function tasks()" in refusal(code.replace("def tasks", "def questions"))
    assert "two lists" in refusal(code.replace("return questions[16:], questions[:16]", "return questions"))
    with pytest.raises(ConfigError, match="no such file"):
        write_task(tmp_path / "absent.py", config)
    elsewhere = config.model_copy(update={"reward": config.reward.model_copy(update={"address": "reward:50051"})})
    with pytest.raises(ConfigError, match=r"reward\.address = reward:50051"):
        write_task(task, elsewhere)


def test_a_new_task_overwrites_nothing(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task", "new", "symbols", "--directory", str(task.parent)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_task(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "configs/tiny-cpu.toml", "--task", str(task), "--resume"]) == 2
    assert "keeps the task that it began with" in capsys.readouterr().err
