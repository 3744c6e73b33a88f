"""`retort dead` and `retort doctor` on a run whose Redis is real."""

import json
import os
from pathlib import Path

import pytest

from retort.cli.__main__ import main
from retort.cli.liveness import identity
from retort.cli.status import write_status
from retort.config import dump_config
from tests.integration.queue_run import Run, an_item, group_ids
from tests.training import a_config


@pytest.fixture
def directory(run: Run, tmp_path: Path) -> Path:
    """A run directory with a status, in whose Redis one work item was set aside and one is waiting."""
    config = a_config(tmp_path).model_copy(update={"run_id": run.run_id})
    (tmp_path / "config.toml").write_text(dump_config(config))
    address = run.url.removeprefix("redis://").partition("/")[0]
    secret = tmp_path / "secrets" / "operator" / "redis-url"
    secret.parent.mkdir(parents=True)
    secret.write_text(run.url)
    me = identity(os.getpid())
    redis = {"name": "redis", **me, "addresses": {"redis": address}, "restarts": 0, "state": "running"}
    progress = {"phase": "waiting for rollouts", "waiting_for": "the groups of step 1"}
    status = {"run": "test", "step": 1, "steps": 3, "policy_version": 0, "since": 0.0, "updated": 9e9, **progress}
    write_status(tmp_path, {**status, "exit_code": None, "launcher": me, "processes": [redis]})
    trainer, replica = run.trainer(), run.replica()
    trainer.issue([an_item("poison"), an_item("waiting")])
    trainer.set_progress(**progress, since=9e9, updated=9e9, step=1)
    [lease] = run.take(replica, 1)
    run.wait(replica.bury(lease, "its prompt kills the engine"))
    return tmp_path


def entry_id(run: Run) -> str:
    [work] = run.view.dead()
    return work.entry_id


def test_what_was_set_aside_is_listed_and_shown(run: Run, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dead", "ls", str(directory)]) == 0
    line = f"{entry_id(run)}  train  poison  failed under epoch 1: its prompt kills the engine"
    assert capsys.readouterr().out == f"{line}\n"
    assert main(["dead", "show", str(directory), entry_id(run)]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["prompt_ids"] == [1, 2, 3]


def test_replayed_work_is_handed_out_again_and_is_dead_no_more(run: Run, directory: Path) -> None:
    assert main(["dead", "replay", str(directory), entry_id(run)]) == 0
    assert run.view.dead() == []
    assert group_ids(run.take(run.replica())) == ["waiting", "poison"]


def test_work_that_the_trainer_asked_for_again_meanwhile_is_not_queued_twice(run: Run, directory: Path) -> None:
    run.trainer().issue([an_item("poison")])
    assert main(["dead", "replay", str(directory), entry_id(run)]) == 0
    assert group_ids(run.take(run.replica())) == ["waiting", "poison"]


def test_dropped_work_is_gone(run: Run, directory: Path) -> None:
    assert main(["dead", "drop", str(directory), entry_id(run)]) == 0
    assert (run.view.dead(), group_ids(run.take(run.replica()))) == ([], ["waiting"])


def test_an_id_that_does_not_exist_is_named_with_those_that_do(
    run: Run, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dead", "drop", str(directory), "1-1"]) == 2
    assert f"no entry 1-1 in the dead-letter stream; there are: {entry_id(run)}" in capsys.readouterr().err


def test_the_doctor_names_the_group_that_was_given_up(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(directory)]) == 0
    first = capsys.readouterr().out.partition("\n")[0]
    assert first.startswith("trainer waits for group poison")
    assert "its prompt kills the engine" in first
    assert main(["doctor", "--json", str(directory)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["waiting"], found["waited_for"]) == ("trainer", "group poison")
