"""Talking to a model that a run made, here the shipped tiny one before any training."""

import io
import json
from pathlib import Path

import pytest
import torch

from retort.cli.__main__ import main
from retort.cli.chat import ChatModel
from retort.config import RunConfig, dump_config

TINY = Path(__file__).parents[3] / "models/tiny"
SYSTEM = "Reason inside <reasoning> tags, then give one letter inside <answer> tags."
QUESTION = "What is the symbol of zinc?\n\nA: Zn\nB: Cu\nC: H\nD: O\nPlease reason step by step."


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose model is the shipped one and whose validation file holds two questions."""
    torch.manual_seed(0)
    validation = tmp_path / "validation.jsonl"
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    rows = [
        {"messages": messages, "answer": "A", "data_source": "periodic_table"},
        {"prompt": "Which element has the symbol O?", "system": SYSTEM, "answer": "D", "data_source": "periodic_table"},
    ]
    validation.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig.model_validate(
        {
            "name": "small",
            "model": {"path": str(TINY), "max_length": 256},
            "data": {"train": str(validation), "validation": str(validation)},
            "sampling": {"max_completion_tokens": 48},
            "trainer": {"steps": 1},
        }
    )
    (tmp_path / "config.toml").write_text(dump_config(config))
    (tmp_path / "hf").symlink_to(TINY)
    return tmp_path


def test_a_prompt_is_answered_once(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(run_dir), "--prompt", QUESTION]) == 0
    out = capsys.readouterr().out
    assert out.startswith("<reasoning>\n")
    assert "<|im_end|>" not in out and "What is the symbol" not in out


class Terminal(io.StringIO):
    """Standard input that a user types into."""

    def isatty(self) -> bool:
        return True


FORM = 'they have 7 lines and end with "Please reason step by step.":'


@pytest.fixture
def validated(run_dir: Path) -> Path:
    """The same run after a validation, all of whose questions have one form."""
    (run_dir / "validation").mkdir()
    groups = [{"question": QUESTION, "answer": "A"}, {"question": QUESTION.replace("zinc", "iron"), "answer": "D"}]
    (run_dir / "validation/step-000000.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    return run_dir


def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(system, question) of everything that the model is asked from now on; its answers are left out."""
    questions: list[tuple[str, str]] = []
    monkeypatch.setattr(ChatModel, "reply", lambda self, system, question: questions.append((system, question)))
    return questions


def test_the_form_is_said_once_with_one_example_and_how_a_question_ends(
    validated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = asked(monkeypatch)
    monkeypatch.setattr("sys.stdin", Terminal("\nWhat?\n\nA: Zn\nB: Cu\n.\n" + QUESTION + "\nrest"))
    assert main(["chat", str(validated)]) == 0
    out = capsys.readouterr().out
    assert out.count(QUESTION) == 1 and FORM in out
    assert "A question ends with a line '.', or with its last line as above" in out
    completed = "What?\n\nA: Zn\nB: Cu\nPlease reason step by step."
    rest = "rest\nPlease reason step by step."
    assert questions == [(SYSTEM, question) for question in (QUESTION, completed, QUESTION, rest)]


def test_a_question_without_the_last_line_of_all_the_runs_questions_gets_it(
    validated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = asked(monkeypatch)
    without = QUESTION.removesuffix("\nPlease reason step by step.")
    for prompt in (without, QUESTION):
        assert main(["chat", str(validated), "--prompt", prompt]) == 0
    assert questions == [(SYSTEM, QUESTION)] * 2
    error = capsys.readouterr().err
    assert error.count("(added the last line of this run's questions") == 1
    assert error.count("loading the model in") == 2 and "another form" not in error


def test_a_question_of_another_form_is_shown_the_right_one(
    validated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked(monkeypatch)
    assert main(["chat", str(validated), "--prompt", "Which element has the symbol K?"]) == 0
    error = capsys.readouterr().err
    assert "another form than the run's" in error and FORM in error and QUESTION in error


def test_piped_lines_are_one_question_or_several_with_a_dot_between(
    validated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = asked(monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION + "\n"))
    assert main(["chat", str(validated)]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n.\n{QUESTION}\n"))
    assert main(["chat", str(validated)]) == 0
    assert questions == [(SYSTEM, QUESTION)] * 3
    assert capsys.readouterr().out.strip() == ""


def test_an_empty_standard_input_is_refused(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["chat", str(run_dir)]) == 2
    assert "standard input holds no question" in capsys.readouterr().err


def test_a_run_whose_questions_differ_gets_no_line_added(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = asked(monkeypatch)
    assert main(["chat", str(run_dir), "--prompt", "What?"]) == 0
    assert questions == [(SYSTEM, "What?")]


def test_another_model_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(""))
    assert main(["chat", str(tmp_path), "--hf-dir", str(TINY)]) == 0
    assert "Enter asks a question" in capsys.readouterr().out


def test_a_run_without_a_model_is_exit_code_2_and_says_what_to_do(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "hf").unlink()
    assert main(["chat", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert "no model here" in error and "--resume" in error
