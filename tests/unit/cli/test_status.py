from pathlib import Path

import pytest

from retort.cli.status import newest_run, read_status, status_lines, write_status
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
    with pytest.raises(ConfigError, match="no run there"):
        read_status(tmp_path)
    with pytest.raises(ConfigError, match="no run under"):
        newest_run(tmp_path)
