"""The main loop of a rollout server with a real queue and a real reward service; only the engine is scripted."""

import asyncio
import os
from collections.abc import Iterator

import pytest

from retort.queues import Evicted, InFlight, RolloutQueue, connect_async
from retort.weight_sync import CommitRequest
from services.rollout.presence import Presence
from services.rollout.sampler import IDLE_BLOCK_S
from tests.integration.queue_run import Run
from tests.integration.sampling_replica import GROUP_SIZE, ids, replica, reward_service, work
from tests.scripted_engine import text_of

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def reward_address() -> Iterator[str]:
    with reward_service(port=0) as address:
        yield address


def test_every_group_is_sampled_scored_and_submitted_once(run: Run, reward_address: str) -> None:
    async def story() -> None:
        names = [f"g{index}" for index in range(6)]
        async with replica(run, reward_address) as one:
            await one.issue(*map(work, names))
            groups = await one.groups(6)
            await one.issue(*map(work, names))  # as a trainer does that waits for long
        assert ids(groups) == names
        assert one.samples() == 6 * GROUP_SIZE
        assert await one.in_flight() == InFlight(waiting=0, leased=0, finished=6)
        assert one.sampler.in_hand == {}

    asyncio.run(story())


def test_a_group_holds_what_the_engine_and_the_checker_said(run: Run, reward_address: str) -> None:
    async def story() -> None:
        async with replica(run, reward_address) as one:
            await one.issue(work("g0", answer="C"))
            [group] = await one.groups(1)
        assert (group.sampled_by, group.step, group.prompt_ids) == ("rollout-0", 9, [1, 2, 3])
        assert [rollout.reward for rollout in group.rollouts] == [0.0, 0.0, 1.0, 0.0]
        assert [rollout.parsed for rollout in group.rollouts] == ["A", "B", "C", "D"]
        first = group.rollouts[0]
        assert text_of(first.completion_ids) == "<answer>A</answer>"
        assert set(first.policy_versions) == {0}
        assert set(first.rollout_logprobs) == {-0.5}
        assert (first.finish_reason, first.format_ok) == ("stop", True)
        assert one.sampler.tokens_generated == 4 * len("<answer>A</answer>")

    asyncio.run(story())


def test_an_unscorable_group_is_buried_with_its_reason_and_the_others_are_done(run: Run, reward_address: str) -> None:
    async def story() -> None:
        async with replica(run, reward_address) as one:
            await one.issue(work("g0"), work("bad", answer=""), work("g1"))
            assert ids(await one.groups(2)) == ["g0", "g1"]
            await one.until(lambda: bool(one.trainer.dead()))
        [dead] = one.trainer.dead()
        assert (dead.group_id, dead.cause) == ("bad", "failed")
        assert dead.reason.startswith("completion 0 is unscorable: answer is empty")
        assert await one.in_flight() == InFlight(waiting=0, leased=0, finished=2)

    asyncio.run(story())


def test_while_the_reward_service_is_down_groups_are_given_back_and_later_done(run: Run, unused_port: int) -> None:
    async def story() -> None:
        async with replica(run, f"127.0.0.1:{unused_port}", budget_s=0.2) as one:
            await one.issue(work("g0"))
            # More deliveries than max_deliveries: giving back does not count against the work.
            await one.until(lambda: one.samples() >= 4 * GROUP_SIZE)
            with reward_service(unused_port):
                [group] = await one.groups(1)
        assert [rollout.reward for rollout in group.rollouts] == [0.0, 1.0, 0.0, 0.0]
        assert one.trainer.dead() == []

    asyncio.run(story())


def test_tokens_of_a_version_that_is_being_verified_leave_after_its_commit(run: Run, reward_address: str) -> None:
    async def story() -> None:
        async with replica(run, reward_address) as one:
            one.engine.gate.clear()
            await one.issue(work("g0"))
            await one.until(lambda: one.samples() == GROUP_SIZE)
            await one.load(1, commit=False)
            one.engine.gate.set()
            await one.until(lambda: one.sampler.tokens_generated > 0)
            assert await one.finished(block_s=0.3) == []
            await one.receiver.commit(CommitRequest(epoch=1, version=1))
            [group] = await one.groups(1)
        assert {version for rollout in group.rollouts for version in rollout.policy_versions} == {1}

    asyncio.run(story())


def test_tokens_of_a_version_that_was_never_committed_are_thrown_away(run: Run, reward_address: str) -> None:
    async def story() -> None:
        async with replica(run, reward_address, lease_s=0.4) as one:
            one.engine.gate.clear()
            await one.issue(work("g0"))
            await one.until(lambda: one.samples() == GROUP_SIZE)
            await one.load(7, commit=False)
            one.engine.gate.set()
            await one.until(lambda: one.sampler.in_hand == {})
            assert await one.in_flight() == InFlight(waiting=0, leased=1, finished=0)  # given back: free for anybody
            await one.load(1)
            [group] = await one.groups(1)
        assert {version for rollout in group.rollouts for version in rollout.policy_versions} == {1}

    asyncio.run(story())


def test_a_group_that_ends_while_an_update_lasts_longer_than_its_lease_is_not_sampled_again(
    run: Run, reward_address: str
) -> None:
    async def story() -> None:
        async with replica(run, reward_address, lease_s=0.4) as one:
            one.engine.gate.clear()
            await one.issue(work("0-000001"))
            await one.until(lambda: one.samples() == GROUP_SIZE)
            await one.load(1, commit=False)
            one.engine.version = 0  # the engine is paused: what ends now was sampled before
            one.engine.gate.set()
            [group] = await one.groups(1)
            assert {version for rollout in group.rollouts for version in rollout.policy_versions} == {0}
            await one.receiver.commit(CommitRequest(epoch=1, version=1))
        assert one.samples() == GROUP_SIZE

    asyncio.run(story())


def test_a_process_that_slept_and_is_given_its_own_work_again_samples_it_once(run: Run, reward_address: str) -> None:
    async def story() -> None:
        async with replica(run, reward_address) as one:
            one.engine.gate.clear()
            await one.issue(work("0-000001"))
            await one.until(lambda: one.samples() == GROUP_SIZE)
            [lease] = one.sampler.in_hand.values()
            await asyncio.to_thread(run.let_lease_run_out, lease)
            await one.issue(work("0-000002"))
            await one.until(lambda: one.samples() == 2 * GROUP_SIZE)
            assert {held.item.group_id for held in one.sampler.in_hand.values()} == {"0-000001", "0-000002"}
            one.engine.gate.set()
            assert ids(await one.groups(2)) == ["0-000001", "0-000002"]
        assert one.samples() == 2 * GROUP_SIZE

    asyncio.run(story())


def test_work_that_asks_for_a_newer_version_waits_for_it(run: Run, reward_address: str) -> None:
    async def story() -> None:
        async with replica(run, reward_address) as one:
            await one.issue(work("later", min_policy_version=2), work("now"))
            assert ids(await one.groups(1)) == ["now"]
            assert one.samples() == GROUP_SIZE
            await one.load(2)
            groups = await one.groups(2)
        assert {group.group_id: group.oldest_policy_version for group in groups} == {"later": 2, "now": 0}

    asyncio.run(story())


def test_a_replica_left_over_from_a_dead_trainer_samples_nothing_for_the_steps_that_made_its_weights(
    run: Run, reward_address: str
) -> None:
    async def story() -> None:
        async with replica(run, reward_address) as one:
            await one.load(3)  # made from the groups of step 3 by a trainer that died before it saved them
            await one.issue(work("again", step=3, min_policy_version=2))
            assert await one.finished(block_s=0.3) == []
            await one.load(2)
            [group] = await one.groups(1)
        assert {version for rollout in group.rollouts for version in rollout.policy_versions} == {2}

    asyncio.run(story())


def test_a_replica_without_a_version_takes_no_work(run: Run, reward_address: str) -> None:
    async def story() -> None:
        async with replica(run, reward_address) as one:
            await one.load(1, commit=False)
            # The last call to take may have begun before; its answer is empty after its own wait.
            await asyncio.sleep(IDLE_BLOCK_S + 0.1)
            await one.issue(work("g0"))
            assert await one.finished(block_s=0.3) == []
            assert await one.in_flight() == InFlight(waiting=1, leased=0, finished=0)
            await one.receiver.commit(CommitRequest(epoch=1, version=1))
            assert ids(await one.groups(1)) == ["g0"]

    asyncio.run(story())


def test_no_more_groups_are_in_hand_than_allowed(run: Run, reward_address: str) -> None:
    async def story() -> None:
        async with replica(run, reward_address, concurrent_groups=2) as one:
            one.engine.gate.clear()
            await one.issue(*(work(f"g{index}") for index in range(6)))
            await one.until(lambda: one.samples() == 2 * GROUP_SIZE)
            assert await one.in_flight() == InFlight(waiting=4, leased=2, finished=0)
            one.engine.gate.set()
            await one.groups(6)

    asyncio.run(story())


def test_a_slow_group_keeps_its_lease(run: Run, reward_address: str) -> None:
    async def story() -> None:
        async with replica(run, reward_address, lease_s=0.4) as one:
            one.engine.gate.clear()
            await one.issue(work("g0"))
            await one.until(lambda: one.samples() == GROUP_SIZE)
            other = RolloutQueue(await connect_async(run.url), run.run_id, "rollout-1", 0.4, 2)
            assert await other.take(limit=1, block_s=1.2) == []  # three leases long
            one.engine.gate.set()
            assert ids(await one.groups(1)) == ["g0"]

    asyncio.run(story())


def test_a_drain_finishes_what_is_in_hand_and_takes_nothing_new(run: Run, reward_address: str) -> None:
    async def story() -> None:
        async with replica(run, reward_address) as one:
            one.engine.gate.clear()
            await one.issue(work("in-hand"))
            await one.until(lambda: one.samples() == GROUP_SIZE)
            one.draining.set()
            await asyncio.sleep(IDLE_BLOCK_S + 0.1)  # the last call to take returns after its own wait
            await one.issue(work("too-late"))
        assert ids(await one.finished()) == ["in-hand"]
        assert await one.in_flight() == InFlight(waiting=1, leased=0, finished=1)

    asyncio.run(story())


def test_the_members_show_what_a_replica_serves_until_the_trainer_evicts_it(run: Run, reward_address: str) -> None:
    async def story() -> None:
        async with replica(run, reward_address) as one:
            presence = Presence("rollout-0", one.sampler.queue, http_url="http://127.0.0.1:1", control_url="")
            await presence.loading()
            member = one.trainer.members()["rollout-0"]
            assert (member.state, member.policy_version, member.pid) == ("loading", None, os.getpid())

            following = asyncio.create_task(presence.follow(one.sampler, one.draining))
            await one.until(lambda: one.trainer.members()["rollout-0"].state == "serving")
            await one.load(1, commit=False)
            await one.until(lambda: one.trainer.members()["rollout-0"].waiting_for == "the trainer's weights")
            await one.receiver.commit(CommitRequest(epoch=1, version=1))
            await one.until(lambda: one.trainer.members()["rollout-0"].policy_version == 1)

            one.trainer.evict(one.trainer.members()["rollout-0"])
            with pytest.raises(Evicted, match="rollout-0 was evicted by the trainer; it must restart"):
                await asyncio.wait_for(following, 5.0)
            assert one.trainer.members() == {}

    asyncio.run(story())
