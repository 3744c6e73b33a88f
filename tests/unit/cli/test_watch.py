from pathlib import Path

from retort.cli.processes import Child, Program
from retort.cli.watch import Sighting, StallClock, milestones, what_a_stop_does, who_waits
from retort.config import RunConfig
from retort.queues import Member

CONFIG = RunConfig.model_validate(
    {
        "name": "small",
        "model": {"path": "none"},
        "data": {"train": "none", "validation": "none"},
        "trainer": {"steps": 1},
        "rollout": {"replicas": 2},
    }
)


def member(name: str, **changes: object) -> Member:
    usual = {"pid": 1, "host": "h", "control_url": "", "http_url": "", "policy_version": 0, "state": "serving"}
    rest = {"incarnation": "a", "groups_in_hand": 0, "tokens_generated": 0, "waiting_for": "", "updated": 0.0}
    return Member(name=name, **{**usual, **rest, **changes})


def test_what_a_stop_does_depends_on_what_has_begun() -> None:
    assert what_a_stop_does("waiting for a rollout replica", {}) == (
        "stopping before the first step, with nothing to save"
    )
    assert what_a_stop_does("validating", {}) == "stopping before the first step, with nothing to save"
    assert what_a_stop_does("training", {0: {}, 1: {}}) == "finishing step 2, then saving"
    assert what_a_stop_does("saving", {0: {}, 1: {}}) == "saving what is trained, then stopping"
    assert what_a_stop_does("waiting for rollouts", {0: {}}) == (
        "finishing step 1, or leaving it out if its rollouts are late, then saving"
    )


def test_a_loading_replica_has_reached_nothing() -> None:
    seen = Sighting(members={"rollout-0": member("rollout-0", state="loading", policy_version=None)})
    assert milestones(seen, {}) == {}


def test_a_run_has_started_when_one_replica_serves_a_verified_version() -> None:
    joining = [member(name, state="joining", policy_version=None) for name in ("rollout-0", "rollout-1")]
    seen = Sighting(progress={"phase": "train"}, members={one.name: one for one in joining})
    assert list(milestones(seen, {})) == ["rollout-0", "rollout-1", "trainer"]
    seen.members["rollout-1"] = member("rollout-1")
    assert milestones(seen, {})["weights"] == "weights verified on 1 replica"


def test_services_that_accept_connections_are_named_with_their_address() -> None:
    assert milestones(Sighting(), {"reward": "127.0.0.1:4711"}) == {"reward": "reward service ready on 127.0.0.1:4711"}


def test_a_run_stalls_when_its_state_stays_the_same_for_longer_than_the_limit() -> None:
    clock = StallClock(limit_s=60.0)
    assert not clock.stalled("step 1", now=100.0)
    assert not clock.stalled("step 1", now=160.0)
    assert clock.stalled("step 1", now=161.0)
    assert not clock.stalled("step 2", now=162.0)


def test_who_waits_for_whom_is_one_line() -> None:
    children = {"rollout-0": Child(Program("rollout-0", ["true"], Path("log")))}
    waiting = member("rollout-0", state="joining", waiting_for="the trainer's first weights")
    seen = Sighting(
        progress={"phase": "wait_groups", "step": "3", "waiting_for": "32 groups"}, members={"rollout-0": waiting}
    )
    assert who_waits(seen, children) == (
        "the trainer (phase 'wait_groups', step 3) waits for 32 groups; "
        "rollout-0 (exited, joining, waits for the trainer's first weights)"
    )
