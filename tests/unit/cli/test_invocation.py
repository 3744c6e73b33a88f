"""What the program tells a user to type, for every way in which it may have been called."""

import sys
from pathlib import Path

import pytest

from retort.cli.invocation import command


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An executable .venv/bin/retort below the working directory, and nothing on PATH."""
    file = tmp_path / ".venv/bin/retort"
    file.parent.mkdir(parents=True)
    file.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    return file


@pytest.mark.parametrize("called", [".venv/bin/retort", "./.venv/bin/retort", "{}/.venv/bin/retort"])
def test_a_script_that_is_not_on_path_is_named_from_the_working_directory(
    script: Path, monkeypatch: pytest.MonkeyPatch, called: str
) -> None:
    monkeypatch.setattr(sys, "argv", [called.format(Path.cwd())])
    assert command("chat", Path("runs/tiny-cpu")) == ".venv/bin/retort chat runs/tiny-cpu"


def test_a_script_elsewhere_is_named_from_the_root(
    script: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "argv", ["../.venv/bin/retort"])
    assert command("status") == f"{script} status"


def test_on_path_the_name_is_enough_but_only_if_it_leads_to_the_same_program(
    script: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", str(script.parent))
    assert command("status") == "retort status"
    other = tmp_path / "other/retort"
    other.parent.mkdir()
    other.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(other.parent))
    assert command("status") == ".venv/bin/retort status"


def test_a_module_is_called_by_its_interpreter_with_links_as_they_are(
    script: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / ".venv/bin/python"
    python.symlink_to("/usr/bin/env")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["/somewhere/retort/cli/__main__.py"])
    assert command("run", "a b.toml") == ".venv/bin/python -m retort.cli run 'a b.toml'"
