"""Talking to a model that a run made, here the shipped tiny one before any training."""

import io
import json
from pathlib import Path

import pytest
import torch

from retort.cli.__main__ import main
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


def test_enter_asks_the_example_and_the_end_of_input_leaves(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["chat", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert f"Example:\n{QUESTION}\n" in out
    assert "<reasoning>\n" in out
    assert out.index("(right answer: A)") < out.index("Which element has the symbol O?")


def test_another_model_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", str(tmp_path), "--hf-dir", str(TINY)]) == 0
    assert "Example:" not in capsys.readouterr().out


def test_a_run_without_a_model_is_exit_code_2_and_says_what_to_do(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "hf").unlink()
    assert main(["chat", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert "no model here" in error and "--resume" in error
