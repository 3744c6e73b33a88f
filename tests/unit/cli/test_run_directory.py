import argparse
from pathlib import Path

import pytest

from retort.cli.run import resume_command
from retort.cli.run_directory import open_run_directory, resolve_config
from retort.config import ConfigError, load_config

RUN_FILE = """
name = "small"
[model]
path = "none"
[data]
train = "none"
validation = "none"
[trainer]
steps = 7
"""


def arguments(tmp_path: Path, **changes: object) -> argparse.Namespace:
    file = tmp_path / "small.toml"
    file.write_text(RUN_FILE)
    usual = {"config": file, "run_dir": tmp_path / "run", "resume": False, "set": []}
    return argparse.Namespace(**{**usual, **changes})


def test_a_new_run_gets_an_absolute_directory_and_an_id_of_its_own(tmp_path: Path) -> None:
    first, second = (resolve_config(arguments(tmp_path)) for _ in range(2))
    assert first.directory == tmp_path / "run"
    assert first.run_id.startswith("small-")
    assert first.run_id != second.run_id


def test_an_override_is_part_of_the_stored_configuration(tmp_path: Path) -> None:
    config = resolve_config(arguments(tmp_path, set=["trainer.steps=3"]))
    with open_run_directory(config) as file:
        assert load_config(file, env={}) == config
    assert config.trainer.steps == 3


def test_a_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    resolve_config(arguments(tmp_path))  # an empty one is fine
    (tmp_path / "run" / "something").touch()
    with pytest.raises(ConfigError, match=r"exists and is not empty\. Continue that run with --resume"):
        resolve_config(arguments(tmp_path))


def test_a_resumed_run_keeps_its_id_and_takes_overrides(tmp_path: Path) -> None:
    config = resolve_config(arguments(tmp_path, set=["trainer.steps=3"]))
    with open_run_directory(config):
        pass
    resumed = resolve_config(arguments(tmp_path, resume=True, set=["seed=5"]))
    assert (resumed.run_id, resumed.trainer.steps, resumed.seed) == (config.run_id, 3, 5)


def test_resuming_where_no_run_is_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run to resume"):
        resolve_config(arguments(tmp_path, resume=True))


def test_resuming_the_run_of_another_name_is_refused(tmp_path: Path) -> None:
    with open_run_directory(resolve_config(arguments(tmp_path, set=["name=other"]))):
        pass
    with pytest.raises(ConfigError, match="holds the run 'other', but the run file names 'small'"):
        resolve_config(arguments(tmp_path, resume=True))


def test_the_resume_command_leads_back_to_the_run(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert resume_command(arguments(tmp_path, run_dir=None), directory) == f"retort run {tmp_path}/small.toml --resume"
    stored = f"retort run {directory}/config.toml --resume"
    assert resume_command(arguments(tmp_path), directory) == stored
    assert resume_command(arguments(tmp_path, run_dir=None, set=["name=other"]), directory) == stored


def test_the_stored_file_resumes_its_own_run(tmp_path: Path) -> None:
    config = resolve_config(arguments(tmp_path))
    with open_run_directory(config) as file:
        pass
    assert resolve_config(arguments(tmp_path, config=file, run_dir=None, resume=True)) == config


def test_a_launcher_that_dies_while_it_writes_leaves_a_run_to_resume_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """As sudden as SIGKILL."""

    def half(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise Killed

    def die_writing(**options: object) -> None:
        config = resolve_config(arguments(tmp_path, **options))
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Path, "write_text", half)
            with open_run_directory(config):
                raise AssertionError("it went on")

    die_writing()
    with open_run_directory(resolve_config(arguments(tmp_path))):  # there was no run yet: it is started once more
        pass
    before = resolve_config(arguments(tmp_path, resume=True))
    die_writing(resume=True)
    assert resolve_config(arguments(tmp_path, resume=True)) == before
