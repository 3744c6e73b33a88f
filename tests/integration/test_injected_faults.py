"""Faults injected into a real vLLM worker: none gets past verification, whichever way the weights went wrong."""

import logging

import pytest

from tests.integration.vllm_fleet import Fleet

pytestmark = pytest.mark.timeout(400)


def test_without_a_fault_the_replica_serves(fleet: Fleet) -> None:
    fleet.inject("")
    assert fleet.sync() == 1
    assert fleet.replica.receiver.state == "serving"


@pytest.mark.parametrize(
    ("fault", "phase", "said"),
    [
        ("flipped_bit", "transfer", "with other bytes than were sent in buckets"),
        ("lost_on_the_wire", "transfer", "with other bytes than were sent in buckets [1]"),
        ("dropped_bucket", "probe", "it does not hold what was sent"),
        ("swapped_pair", "probe", "it does not hold what was sent"),
        ("stale_head", "probe", "it does not hold what was sent"),
        ("wrong_transpose", "probe", "it does not hold what was sent"),
    ],
)
def test_a_fault_stops_the_commit_and_the_replica_takes_no_work(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, fault: str, phase: str, said: str
) -> None:
    caplog.set_level(logging.INFO, logger="retort")
    fleet.inject(fault)
    fleet.replica.calls.clear()
    assert fleet.sync() == 0
    assert "commit" not in fleet.replica.calls
    assert fleet.replica.receiver.served_version is None
    assert not fleet.replica.wait(fleet.replica.receiver.wait_until_serving(0, 0.1))
    [fields] = [r.__dict__["fields"] for r in caplog.records if r.getMessage() == "replica_evicted"]
    assert (fields["replica"], fields["phase"]) == ("rollout-0", phase)
    assert said in fields["reason"]

    fleet.inject("")
    fleet.restart_replica()
    assert fleet.sync() == 1, "nothing but the fault was in the way"
