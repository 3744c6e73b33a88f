"""Every interleaving of the version and lease protocol, with a crash at any point. It holds; seeded bugs are found."""

import pytest

from tests.model.explorer import Exploration, explore
from tests.model.protocol import Protocol, Replica, State, is_done, violation


def walk(
    replicas: int,
    bug: str = "",
    *,
    steps: int = 2,
    crashes: int = 1,
    faults: int = 1,
    drains: int = 0,
    max_staleness: int = 0,
) -> Exploration[State]:
    initial = State(
        (Replica(),) * replicas,
        work=("absent",) * steps,
        crashes=crashes,
        faults=faults,
        drains=drains,
        max_staleness=max_staleness,
    )
    return explore(initial, Protocol(bug).actions, violation, is_done)


@pytest.mark.parametrize(
    ("replicas", "steps", "faults", "max_staleness"),
    [(1, 2, 1, 0), (2, 2, 0, 0), (2, 1, 1, 0), (3, 1, 1, 0), (1, 2, 1, 1), (2, 2, 0, 1), (1, 3, 0, 2)],
    ids=str,
)
def test_the_protocol_keeps_its_promises_with_a_crash_at_any_point(
    replicas: int, steps: int, faults: int, max_staleness: int
) -> None:
    """A fault is a lost answer, a late call, damaged bytes, a broken broadcast, or a lease that ran out too early."""
    found = walk(replicas, steps=steps, faults=faults, max_staleness=max_staleness)
    assert found.violation == "", found.trace
    assert found.num_states > 10_000


@pytest.mark.parametrize(
    ("replicas", "steps", "faults", "max_staleness"), [(1, 2, 1, 0), (2, 1, 1, 0), (1, 2, 1, 1)], ids=str
)
def test_the_protocol_keeps_its_promises_when_a_replica_is_drained_at_any_point(
    replicas: int, steps: int, faults: int, max_staleness: int
) -> None:
    found = walk(replicas, steps=steps, faults=faults, drains=1, max_staleness=max_staleness)
    assert found.violation == "", found.trace
    assert found.num_states > 10_000


BUGS = {
    "version_advanced_before_apply": "tokens are said to be of another version than sampled them",
    "late_joiner_skips_verification": "a replica serves weights that are not what was sent",
    "commit_out_of_phase": "a replica serves weights that are not what was sent",
    "sampled_before_commit": "a token was sampled by weights that were not committed",
    "epochs_not_compared": "tokens that were sampled for one trainer left for another",
    "staleness_not_checked": "tokens are staler than allowed",
    "successor_trusts_what_a_replica_says": "the trainer believes a replica to be current that is not",
    "fence_not_checked_by_replica": "a replica obeyed a trainer that was replaced",
    "fence_not_checked_by_redis": "a trainer that was replaced wrote to Redis",
    "duplicates_are_stored": "a group is there twice",
    "acknowledged_before_appended": "the run can never be finished",
    "expired_leases_are_kept": "the run can never be finished",
    "drain_hides_an_update": "the run can never be finished",
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_found(bug: str) -> None:
    found = walk(2 if bug == "duplicates_are_stored" else 1, bug, drains=int(bug == "drain_hides_an_update"))
    assert found.violation == BUGS[bug], found
