"""At moment 100: which line `retort doctor` begins with."""

from pathlib import Path
from typing import Any

from retort.cli.doctor import Evidence, diagnose
from retort.queues import DeadWork, InFlight, Member, PendingLease

PROCESSES = [
    {"name": name, "pid": 7, "addresses": {}, "restarts": 3 if name == "redis" else 0, "state": "running"}
    for name in ("redis", "reward", "rollout-0", "rollout-1", "trainer")
]
STATUS = {"phase": "waiting for rollouts", "updated": 99.5, "exit_code": None, "processes": PROCESSES}
WAITING = {
    "phase": "waiting for rollouts",
    "waiting_for": "the groups of step 5",
    "since": "60",
    "updated": "99.9",
    "step": "5",
}
LEASE = PendingLease(kind="train", entry_id="1-0", replica="rollout-1", idle_s=1.0, deliveries=1)


def a_member(name: str, state: Any = "serving", *, updated: float = 99.0, waiting_for: str = "") -> Member:
    return Member(
        name=name,
        pid=41,
        host="here",
        control_url="",
        http_url="",
        policy_version=4 if state == "serving" else None,
        state=state,
        incarnation="first",
        groups_in_hand=0,
        tokens_generated=0,
        waiting_for=waiting_for,
        updated=updated,
    )


def line(*, redis_answers: bool = True, status: dict[str, Any] | None = None, **seen: Any) -> str:
    found = {
        "progress": WAITING,
        "members": {name: a_member(name) for name in ("rollout-0", "rollout-1")},
        "in_flight": InFlight(waiting=1, leased=3, finished=2),
        "lease": LEASE,
        **seen,
    }
    everything = {**STATUS, **(status or {})}
    return diagnose(Evidence(Path("r"), 100.0, everything, redis_answers=redis_answers, **found)).line()


def test_a_run_in_which_all_is_well_waits_for_the_groups_in_work() -> None:
    assert line() == (
        "trainer waits for the groups of step 5, since 40 s: 3 are being sampled by rollout-1, 1 wait for a replica, "
        "2 are there. Try: retort status"
    )


def test_while_the_trainer_computes_nobody_waits() -> None:
    training = {"phase": "training", "waiting_for": "", "since": "98", "updated": "98", "step": "5"}
    assert line(progress=training) == (
        "nobody waits for anybody, since 0 s: the trainer is at step 5, phase training. Try: retort status"
    )


def test_what_the_trainer_warns_of_is_passed_on() -> None:
    warned = {"phase": "training", "step": "5", "updated": "99", "since": "99", "warning": "most completions are cut"}
    assert "phase training; look at this: most completions are cut. Try" in line(progress=warned)


def test_a_frozen_replica_that_holds_the_work_is_named() -> None:
    members = {"rollout-0": a_member("rollout-0"), "rollout-1": a_member("rollout-1", updated=75.0)}
    assert line(members=members) == (
        "trainer waits for rollout-1, since 25 s: nothing was heard of it (pid 41) since; it was serving. "
        "Try: less r/logs/rollout-1.log"
    )


def test_a_replica_that_is_loading_is_named_while_none_serves() -> None:
    waiting = {**WAITING, "phase": "waiting for a rollout replica", "waiting_for": "a rollout replica"}
    members = {"rollout-0": a_member("rollout-0", "loading")}
    assert line(progress=waiting, members=members, lease=None).startswith(
        "trainer waits for rollout-0, since 40 s: it is loading. Try:"
    )
    assert line(progress=waiting, members={}, lease=None).startswith(
        "trainer waits for rollout-0, since 40 s: no replica has announced itself. Try: less r/logs/rollout-0.log"
    )


def test_a_reward_service_that_does_not_answer_is_named() -> None:
    members = {"rollout-1": a_member("rollout-1", waiting_for="the reward service")}
    assert line(members=members) == (
        "trainer waits for reward, since 40 s: rollout-1 has asked it for scores and has no answer. "
        "Try: less r/logs/reward.log"
    )


def test_a_silent_trainer_is_named_before_what_it_last_waited_for() -> None:
    assert line(progress={**WAITING, "updated": "70"}).startswith(
        "everybody waits for trainer, since 30 s: it has said nothing since, in phase waiting for rollouts"
    )


def test_a_redis_that_is_away_is_named_before_all_that_it_would_say() -> None:
    assert line(redis_answers=False).startswith(
        "everybody waits for redis, since 0 s: it does not answer, and was started again 3 times. Try: less r/logs/"
    )


def test_work_that_was_given_up_is_named_with_its_reason() -> None:
    dead = DeadWork(entry_id="9-0", kind="train", group_id="0-7", reason="too long", cause="failed", epoch=1)
    assert line(dead=[dead]) == (
        "trainer waits for group 0-7, since 40 s: it was given up: too long. Try: retort dead show r 9-0"
    )


def test_a_run_without_a_launcher_and_one_that_ended_are_to_be_resumed() -> None:
    assert line(status={"updated": 40.0}) == (
        "the run waits for its launcher, since 60 s: status.json is not written any more. "
        "Try: retort run r/config.toml --resume"
    )
    assert line(status={"exit_code": 4, "phase": "stalled"}) == (
        "nobody waits for anybody, since 0 s: the run has ended (stalled, exit code 4). "
        "Try: retort run r/config.toml --resume"
    )
    assert line(status={"exit_code": 0, "phase": "done"}).endswith("Try: retort report r")


def test_a_process_of_this_machine_that_was_stopped_or_died_is_named_at_once() -> None:
    assert line(conditions={"rollout-0": "frozen"}).startswith("trainer waits for rollout-0")
    assert line(conditions={"trainer": "gone", "rollout-0": "gone"}).startswith("everybody waits for trainer")
    tracker = {"name": "wandb", "pid": 8, "addresses": {}, "restarts": 1, "state": "running"}
    nobody_waits_for_it = line(conditions={"wandb": "gone"}, status={"processes": [*PROCESSES, tracker]})
    assert nobody_waits_for_it.startswith("trainer waits for the groups of step 5")
    frozen_launcher = line(conditions={"launcher": "frozen"}, status={"launcher": {"pid": 7}})
    assert frozen_launcher == (
        "the run waits for its launcher, since 0 s: its process 7 was stopped by a signal. Try: kill -CONT 7"
    )
    gone = line(conditions={"launcher": "gone", "redis": "gone"})
    assert gone.startswith("the run waits for its launcher") and "--resume" in gone
