"""What a tracker is told: each step once, whatever ended in between; and what is said when it cannot be told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from retort.cli import preflight
from retort.cli.__main__ import main
from retort.cli.track import Follower, place_of, trackers
from retort.config import ConfigError, MissingDependencyError, RunConfig
from retort.metrics_file import Metrics
from tests.finished_run import AVG, a_config, write_run

REWARD = "critic/score/mean"


class Sink:
    """A tracker that notes what it is told."""

    def __init__(self, config: RunConfig) -> None:
        self.told: list[tuple[int, Metrics]] = []
        self.is_closed = False

    def log(self, step: int, line: Metrics) -> None:
        self.told.append((step, line))

    def close(self) -> None:
        self.is_closed = True


class Full(Sink):
    """Takes what comes before step 2."""

    def log(self, step: int, line: Metrics) -> None:
        if step == 2:
            raise OSError("no space left")
        super().log(step, line)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = a_config(tmp_path / "letters")
    write_run(config.directory, config, [0.25, 0.5, 0.75])
    return config


def follow(config: RunConfig, kind: type[Sink] = Sink) -> tuple[Follower, Sink]:
    opened: list[Sink] = []

    def open_sink(config: RunConfig) -> Sink:
        opened.append(kind(config))
        return opened[-1]

    with place_of(config, "wandb") as file:
        return Follower(config, "wandb", file, open_sink), opened[0]


def passed_on(config: RunConfig) -> list[int]:
    """The steps of which a tracker that is opened now is told."""
    follower, sink = follow(config)
    follower.pass_on()
    follower.close()
    assert sink.is_closed
    return [step for step, _ in sink.told]


def write(config: RunConfig, *lines: Metrics, mode: str = "a") -> None:
    with (config.directory / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_it_is_told_every_line_and_the_next_start_goes_on_where_that_ended(config: RunConfig) -> None:
    assert passed_on(config) == [0, 1, 2]
    place = json.loads((config.directory / "trackers/wandb.json").read_text())
    assert place == {"step": 2, "validated": 2}
    write(config, {"step": 3, REWARD: 0.5})
    assert passed_on(config) == [3]
    assert passed_on(config) == []


def test_a_validation_that_comes_after_later_steps_is_passed_on_once(config: RunConfig) -> None:
    write(config, {"step": 3, REWARD: 0.5}, {"step": 4, REWARD: 0.5}, {"step": 3, AVG: 0.8})
    assert passed_on(config) == [0, 1, 2, 3, 4, 3]
    assert passed_on(config) == []
    write(config, {"step": 4, AVG: 0.9})
    assert passed_on(config) == [4]


def test_a_resumed_run_that_repeats_steps_tells_none_of_them_twice(config: RunConfig) -> None:
    follower, sink = follow(config)
    follower.pass_on()
    first, second = {"step": 0, AVG: 0.25}, {"step": 1, REWARD: 0.25, AVG: 0.5}
    write(config, first, second, mode="w")  # cut back to the checkpoint of step 1, while it is being followed
    follower.pass_on()
    write(config, {"step": 2, REWARD: 0.4}, {"step": 3, REWARD: 0.5})
    follower.pass_on()
    assert [step for step, _ in sink.told] == [0, 1, 2, 3]
    assert dict(sink.told)[2][REWARD] == 0.375  # as it was told first
    assert passed_on(config) == []


def test_a_line_that_it_did_not_take_is_told_again_at_the_next_start(config: RunConfig) -> None:
    follower, sink = follow(config, Full)
    with pytest.raises(OSError, match="no space left"):
        follower.pass_on()
    assert [step for step, _ in sink.told] == [0, 1]
    assert passed_on(config) == [2]


def test_a_tracker_that_never_closes_is_given_up_by_name(config: RunConfig) -> None:
    hangs = """
import sys, threading
from pathlib import Path
from retort.cli.track import Follower
from tests.finished_run import a_config
class Hangs:
    def __init__(self, config): pass
    def log(self, step, line): pass
    def close(self): threading.Event().wait()
run_dir, place = map(Path, sys.argv[1:])
follower = Follower(a_config(run_dir), "wandb", place, Hangs, deadline_s=0.2)
follower.pass_on()
follower.close()
"""
    command = [sys.executable, "-c", hangs, str(config.directory), str(config.directory / "wandb.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "retort track: wandb did not close within 0.2 s." in ended.stderr


def test_two_processes_do_not_tell_the_same_tracker(config: RunConfig) -> None:
    refused = pytest.raises(ConfigError, match="another process passes its metrics on to wandb already")
    with place_of(config, "wandb"), place_of(config, "mlflow"), refused, place_of(config, "wandb"):
        pass
    assert passed_on(config) == [0, 1, 2]


def test_a_tracker_whose_package_is_missing_says_what_to_install(
    config: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)  # whatever this machine has
    assert main(["track", str(config.directory), "--to", "trackio"]) == 3
    assert "tracker trackio: not installed. Run `pip install 'retort[trackio]'`." in capsys.readouterr().err


def test_a_run_whose_tracker_is_not_installed_is_refused_before_anything_starts(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"tracker mlflow: not installed.*retort\[mlflow\]"):
        preflight.check_dependencies(config.model_copy(update={"trackers": ["mlflow"]}))


def test_a_directory_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["track", str(tmp_path), "--to", "wandb"]) == 2
    assert "no run there (no config.toml)" in capsys.readouterr().err


def test_no_password_leaves_the_machine(config: RunConfig) -> None:
    secret = RunConfig.model_validate(config.model_dump() | {"redis": {"url": "redis://:hunter2@redis:6379/0"}})
    assert "hunter2" not in str(trackers._settings(secret))
    assert trackers._settings(secret)["trainer"]["steps"] == 4
