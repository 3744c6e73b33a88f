"""`retort dead` and `retort doctor` on a run whose Redis is real."""

import json
import os
import time
from pathlib import Path

import pytest

from retort.cli.__main__ import main
from retort.cli.liveness import identity
from retort.cli.status import write_status
from retort.config import dump_config
from tests.integration.queue_run import Run, a_group, an_item, group_ids
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
    shown, attempt, content = capsys.readouterr().out.split("\n", 2)
    assert (shown, attempt.split("  ")[2]) == (line, "rollout-0: its prompt kills the engine")
    assert json.loads(content)["prompt_ids"] == [1, 2, 3]


def test_what_was_set_aside_says_who_held_it_when_and_why_each_of_them_failed(run: Run) -> None:
    run.trainer().issue([an_item("poison")])
    first, second, third = (run.replica(f"rollout-{number}") for number in range(3))
    begun = time.time()
    [lease] = run.take(first, 1)
    for _ in range(2):  # as if its reply had been lost
        run.wait(first.fail(lease, "no such checker"))
    run.let_lease_run_out(lease)
    [given_back] = run.take(second, 1)
    run.wait(second.give_back(given_back))
    for replica in (third, second):
        [lease] = run.take(replica, 1)
        run.let_lease_run_out(lease)
    assert run.take(first, 1) == []
    [work] = run.view.dead()
    assert [(attempt.replica, attempt.why) for attempt in work.attempts] == [
        ("rollout-0", "no such checker"),
        ("rollout-2", "its lease ran out"),
        ("rollout-1", "its lease ran out"),
    ]
    times = [attempt.at for attempt in work.attempts]
    assert begun - 1 < times[0] <= times[1] <= times[2] < time.time() + 1
    assert run.redis.exists(run.keys("history")) == 0


def test_the_history_of_work_that_is_finished_or_withdrawn_is_forgotten(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    trainer.issue([an_item("g0"), an_item("g1"), an_item("v0", kind="validation")])
    leases = run.take(replica, 3)
    for lease in leases:
        run.wait(replica.fail(lease, "busy"))
    assert run.redis.hlen(run.keys("history")) == 3
    run.wait(replica.submit(leases[0], a_group(leases[0])))
    assert run.redis.hlen(run.keys("history")) == 2
    trainer.withdraw("validation")
    assert run.redis.hlen(run.keys("history")) == 1
    trainer.withdraw_later(0)
    assert run.redis.hlen(run.keys("history")) == 0


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
