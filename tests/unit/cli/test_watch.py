from pathlib import Path

from retort.cli.processes import Child, Program
from retort.cli.watch import Sighting, StallClock, milestones, who_waits
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
