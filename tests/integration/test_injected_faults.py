"""Faults injected into a real vLLM worker: none gets past verification, whichever way the weights went wrong."""

import asyncio
import logging

import pytest

from retort.config import WeightSyncConfig
from retort.rollouts import SamplingParameters
from services.rollout.engine import Sampled
from tests.integration.vllm_fleet import SEQUENCES, Fleet

pytestmark = pytest.mark.timeout(400)

LONG = SamplingParameters(temperature=1.0, top_p=1.0, max_completion_tokens=200)


def test_without_a_fault_the_replica_serves(fleet: Fleet) -> None:
    fleet.inject("")
    assert fleet.sync() == 1
    assert fleet.replica.receiver.state == "serving"


async def begin(fleet: Fleet) -> list[asyncio.Task[Sampled]]:
    """Twice as many completions as the engine samples at a time; the first of them has ended."""
    engine = fleet.replica.engine
    samples = (engine.sample(list(range(20, 44)), LONG, seed, urgent=True) for seed in range(4 * SEQUENCES))
    tasks = [asyncio.create_task(sample) for sample in samples]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return tasks


async def versions_of(tasks: list[asyncio.Task[Sampled]]) -> list[set[int]]:
    return [set(sampled.policy_versions) for sampled in await asyncio.gather(*tasks)]


@pytest.mark.parametrize(
    ("fault", "phase", "said"),
    [
        ("flipped_bit", "transfer", "with other bytes than were sent in buckets"),
        ("lost_on_the_wire", "transfer", "with other bytes than were sent in buckets [1]"),
        ("dropped_bucket", "probe", "the engine was not given all weights of "),
        ("swapped_pair", "probe", "it does not hold what was sent"),
        ("stale_head", "probe", "it does not hold what was sent"),
        ("wrong_transpose", "probe", "it does not hold what was sent"),
    ],
)
def test_a_fault_stops_the_commit_before_a_token_is_sampled(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, fault: str, phase: str, said: str
) -> None:
    caplog.set_level(logging.INFO, logger="retort")
    fleet.inject("")
    if fleet.replica.receiver.state != "serving":
        fleet.restart_replica()
    assert fleet.sync() == 1
    before = fleet.version
    in_flight = fleet.replica.wait(begin(fleet))

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
    found = fleet.replica.wait(versions_of(in_flight))
    assert {before, before + 2} in found, "some were half-way"
    assert set().union(*found) == {before, before + 2}


@pytest.mark.parametrize("fault", ["dropped_bucket", "lost_tensor", "nothing_loaded"])
def test_what_was_not_loaded_is_noticed_where_the_probe_cannot_see_it(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """Changes as small as a step's of the reference run, 32 updates at a rate of 1e-6, with its tolerance of 0.3."""
    fleet.inject("")
    fleet.restart_replica()
    tight, fleet.sender = fleet.sender, fleet.new_sender(WeightSyncConfig())
    try:
        assert fleet.sync() == 1
        assert fleet.sync(change=3.2e-5) == 1
        fleet.inject(fault)
        assert fleet.sync(change=3.2e-5) == 0
        [fields] = [r.__dict__["fields"] for r in caplog.records if r.getMessage() == "replica_evicted"]
        assert fields["phase"] == "probe"
        assert "the engine was not given all weights of " in fields["reason"]
    finally:
        fleet.inject("")
        fleet.restart_replica()
        fleet.sender = tight
