import json
import os
from pathlib import Path

import pytest

from retort.cli.__main__ import main
from retort.cli.liveness import identity, is_gone
from retort.cli.status import all_runs, read_status, status_lines, write_status
from retort.config import ConfigError

STATUS = {
    "run": "tiny",
    "phase": "wait_groups",
    "step": 12,
    "steps": 40,
    "policy_version": 11,
    "waiting_for": "3 groups from rollout-0",
    "since": 95.0,
    "updated": 99.0,
    "exit_code": None,
    "processes": [
        {"name": "rollout-0", "pid": 7, "addresses": {"http": "127.0.0.1:80"}, "restarts": 1, "state": "running"}
    ],
}


def test_a_running_run_says_who_waits_for_whom() -> None:
    replicas = [{"name": "rollout-0", "state": "serving", "policy_version": 11, "updated": 99.0}]
    assert status_lines(Path("runs/tiny"), STATUS, replicas, now=100.0) == [
        "run       tiny in runs/tiny",
        "phase     wait_groups",
        "step      12 of 40, policy version 11",
        "waiting   trainer waits for 3 groups from rollout-0 (5 s)",
        "process   rollout-0: running, pid 7, restarts: 1 http=127.0.0.1:80",
        "replica   rollout-0: serving, policy version 11",
    ]


def test_a_status_that_nobody_keeps_current_is_called_so() -> None:
    assert status_lines(Path("r"), STATUS, [], now=160.0)[-1].startswith("warning   written 61 s ago")


def test_a_run_that_ended_shows_its_exit_code_and_waits_for_nobody() -> None:
    ended = {**STATUS, "phase": "done", "exit_code": 0, "processes": []}
    assert status_lines(Path("r"), ended, [], now=9999.0)[1:] == [
        "phase     done (exit code 0)",
        "step      12 of 40, policy version 11",
    ]


def test_status_goes_to_the_file_and_back(tmp_path: Path) -> None:
    write_status(tmp_path, STATUS)
    assert read_status(tmp_path) == STATUS
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run there: status.json.* `retort status` lists the runs"):
        read_status(tmp_path)
    with pytest.raises(ConfigError, match="nope: no such directory"):
        read_status(tmp_path / "nope")
    with pytest.raises(ConfigError, match="no run under"):
        all_runs(tmp_path)


def test_a_run_whose_launcher_was_killed_before_its_first_status_can_be_begun(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(ConfigError, match=r"its launcher ended before .*retort run .*config.toml --resume"):
        read_status(tmp_path)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory runs/ below the working directory, with a finished run in it."""
    monkeypatch.chdir(tmp_path)
    put_run(Path("runs/done"), phase="done", step=40, exit_code=0, elapsed_s=226.0, processes=[])
    lines = [{"step": step, "time": 0.0, "val-core/a/acc/mean@16": value} for step, value in ((0, 0.45), (40, 0.97))]
    Path("runs/done/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("runs/done/report.html").touch()
    return Path("runs")


def put_run(directory: Path, **changes: object) -> None:
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(
        'name = "tiny"\n[model]\npath = "m"\n[data]\ntrain = "t"\nvalidation = "v"\n[trainer]\nsteps = 40\n'
    )
    write_status(directory, {**STATUS, **changes})


def test_a_finished_run_says_what_it_reached(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "runs/done"]) == 0
    assert capsys.readouterr().out.splitlines()[3:] == [
        "result    avg@16 0.450 at version 0 -> 0.970 at version 40 (+0.520)",
        "took      3:46 since it was last started",
        "report    runs/done/report.html",
    ]


def test_a_run_whose_launcher_is_gone_has_died_and_says_how_to_resume(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = identity(os.getpid()) | {"started": 1.0}  # its process id is another's now
    put_run(runs / "killed", launcher=gone, processes=[{**STATUS["processes"][0], **gone}])
    assert main(["status"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "run       tiny in runs/killed"
    assert out[1].startswith("phase     died: its launcher is gone; last seen ")
    assert out[3].startswith("process   rollout-0: gone, pid ")
    assert out[4:] == [
        "resume    retort run runs/killed/config.toml --resume",
        "other run runs/done: done, step 40 of 40",
    ]


def test_a_run_whose_launcher_is_there_is_not_called_dead() -> None:
    assert not is_gone(identity(os.getpid()))
    assert is_gone(identity(None))
    assert not is_gone({"host": "elsewhere", "pid": 1, "started": 1.0})
