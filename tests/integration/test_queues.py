"""The queue against a real server: leases, fencing, idempotence by key."""

import asyncio
import time
from typing import Literal

import pytest

from retort.queues import (
    Fenced,
    InFlight,
    Lease,
    Policy,
    clear_stop,
    request_stop,
)
from retort.queues.protocol import CONSUMER_GROUP, checksum
from tests.integration.queue_run import Run, a_group, a_member, an_item, group_ids

# Taking --------------------------------------------------------------------------------------------


def test_two_replicas_never_get_the_same_new_work(run: Run) -> None:
    run.trainer().issue([an_item(f"g{i}") for i in range(10)])
    first, second = run.replica("rollout-0"), run.replica("rollout-1")
    taken = [*run.take(first, 3), *run.take(second, 3), *run.take(first, 3), *run.take(second, 3)]
    assert group_ids(taken) == [f"g{i}" for i in range(10)]


def test_training_is_taken_before_validation_which_fills_what_it_leaves_idle(run: Run) -> None:
    run.trainer().issue([an_item("v0", "validation"), an_item("g0"), an_item("v1", "validation")])
    assert group_ids(run.take(run.replica(), 2)) == ["g0", "v0"]


def test_a_lease_carries_the_item_that_was_issued(run: Run) -> None:
    run.trainer().issue([an_item("g0")])
    [lease] = run.take(run.replica())
    assert (lease.item, lease.deliveries) == (an_item("g0"), 1)


def test_a_waiting_replica_gets_work_when_it_is_issued(run: Run) -> None:
    replica, trainer = run.replica(), run.trainer()

    async def take_while_the_trainer_issues() -> list[Lease]:
        taking = asyncio.create_task(replica.take(limit=1, block_s=5))
        await asyncio.to_thread(trainer.issue, [an_item("g0")])
        return await taking

    assert group_ids(run.wait(take_while_the_trainer_issues())) == ["g0"]


def test_nothing_to_take_is_an_empty_list_after_the_wait(run: Run) -> None:
    assert run.wait(run.replica().take(limit=1, block_s=0.01)) == []


def test_an_unacknowledged_lease_is_delivered_again_after_its_time(run: Run) -> None:
    run.trainer().issue([an_item("g0")])
    died = run.replica("rollout-0", lease_s=0.05)
    run.take(died)
    asked = time.monotonic()
    heir = run.replica("rollout-1", lease_s=0.05)
    leases: list[Lease] = []
    while not leases and time.monotonic() - asked < 5:
        leases = run.wait(heir.take(limit=1, block_s=0.01))
    assert [(lease.item.group_id, lease.deliveries) for lease in leases] == [("g0", 2)]


def test_a_lease_that_is_renewed_stays(run: Run) -> None:
    run.trainer().issue([an_item("g0")])
    holder, other = run.replica("rollout-0"), run.replica("rollout-1")
    leases = run.take(holder)
    run.let_lease_run_out(leases[0])
    assert run.wait(holder.renew(leases)) == []
    assert run.take(other) == []


def test_a_renewal_that_comes_too_late_does_not_steal_the_lease_back(run: Run) -> None:
    run.trainer().issue([an_item("g0")])
    late, heir = run.replica("rollout-0"), run.replica("rollout-1")
    leases = run.take(late)
    run.let_lease_run_out(leases[0])
    run.take(heir)
    assert run.wait(late.renew(leases)) == leases
    lease = run.view.oldest_lease("train")
    assert lease is not None and (lease.replica, lease.deliveries) == ("rollout-1", 2)


def test_work_that_is_given_back_is_there_for_others_at_once_and_was_not_a_failure(run: Run) -> None:
    run.trainer().issue([an_item("g0")])
    giver, other = run.replica("rollout-0"), run.replica("rollout-1")
    run.let_lease_run_out(run.take(giver)[0])
    [lease] = run.take(giver)
    assert lease.deliveries == 2
    for _ in range(2):
        run.wait(giver.give_back(lease))
    assert [(again.item.group_id, again.deliveries) for again in run.take(other)] == [("g0", 2)]


def test_a_replica_that_leaves_gives_everything_back_and_is_no_member(run: Run) -> None:
    run.trainer().issue([an_item("g0"), an_item("v0", "validation")])
    leaver, other = run.replica("rollout-0"), run.replica("rollout-1")
    run.wait(leaver.announce(a_member()))
    run.take(leaver)
    run.wait(leaver.leave())
    assert group_ids(run.take(other)) == ["g0", "v0"]
    assert run.view.members() == {}


# Submitting ----------------------------------------------------------------------------------------


def test_the_trainer_reads_what_was_submitted_after_its_cursor(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    trainer.issue([an_item("g0"), an_item("g1")])
    first, second = run.take(replica)
    assert run.wait(replica.submit(first, a_group(first))) == "stored"
    [(cursor, group)] = trainer.read_groups("train", "0", block_s=0, limit=10)
    assert group == a_group(first)
    run.wait(replica.submit(second, a_group(second)))
    assert [group.group_id for _, group in trainer.read_groups("train", cursor, block_s=0, limit=10)] == ["g1"]
    assert trainer.in_flight("train") == InFlight(waiting=0, leased=0, finished=2)


def test_a_late_submit_of_a_redelivered_group_is_refused_as_duplicate(run: Run) -> None:
    trainer = run.trainer()
    trainer.issue([an_item("g0")])
    late, heir = run.replica("rollout-0"), run.replica("rollout-1")
    [lost] = run.take(late)
    run.let_lease_run_out(lost)
    [taken] = run.take(heir)
    assert run.wait(heir.submit(taken, a_group(taken, "rollout-1"))) == "stored"
    assert run.wait(late.submit(lost, a_group(lost, "rollout-0"))) == "duplicate"
    assert [group.sampled_by for _, group in trainer.read_groups("train", "0", 0, 10)] == ["rollout-1"]


def test_a_submit_whose_reply_was_lost_may_be_repeated(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    trainer.issue([an_item("g0")])
    [lease] = run.take(replica)
    assert [run.wait(replica.submit(lease, a_group(lease))) for _ in range(3)] == ["stored", "duplicate", "duplicate"]
    assert len(trainer.read_groups("train", "0", 0, 10)) == 1


def test_a_group_that_a_checkpoint_contains_is_unknown(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    trainer.issue([an_item("g0")])
    [lease] = run.take(replica)
    run.wait(replica.submit(lease, a_group(lease)))
    trainer.commit("train", [(entry_id, group.group_id) for entry_id, group in trainer.read_groups("train", "0", 0, 9)])
    assert run.wait(replica.submit(lease, a_group(lease))) == "unknown"
    assert trainer.in_flight("train") == InFlight(waiting=0, leased=0, finished=0)


def test_a_stale_submit_does_not_end_the_work_that_has_its_entry_id_now(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    trainer.issue([an_item("g0")])
    [stale] = run.take(replica)
    run.empty()
    trainer.issue([an_item("g1")])
    [lease] = run.take(replica)
    wrong = Lease(entry_id=lease.entry_id, item=stale.item, deliveries=1)
    assert run.wait(replica.submit(wrong, a_group(wrong))) == "unknown"
    assert trainer.in_flight("train") == InFlight(waiting=0, leased=1, finished=0)


def test_a_commit_ends_the_work_of_a_group_whose_submit_the_server_forgot(run: Run) -> None:
    trainer = run.trainer()
    trainer.issue([an_item("g0")])
    assert trainer.commit("train", [("1-0", "g0")]) == 0
    assert trainer.in_flight("train") == InFlight(waiting=0, leased=0, finished=0)
    assert trainer.issue([an_item("g0")]) == ["new"]


def test_a_stale_submit_of_a_group_that_was_issued_again_ends_its_new_work(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    trainer.issue([an_item("g0")])
    [stale] = run.take(replica)
    run.empty()
    trainer.issue([an_item("g1"), an_item("g0")])
    assert run.wait(replica.submit(stale, a_group(stale))) == "stored"
    assert group_ids(run.take(replica)) == ["g1"]


# Failing -------------------------------------------------------------------------------------------


def test_work_that_was_handed_out_too_often_is_buried_and_named(run: Run) -> None:
    trainer = run.trainer()
    trainer.issue([an_item("poison"), an_item("g1")])
    for deliveries in (1, 2):
        [lease] = run.take(run.replica(f"rollout-{deliveries}", max_deliveries=2), 1)
        assert (lease.item.group_id, lease.deliveries) == ("poison", deliveries)
        run.let_lease_run_out(lease)
    assert group_ids(run.take(run.replica(max_deliveries=2), 1)) == ["g1"]
    reason = "handed out 2 times and never finished, last by rollout-2"
    [work] = trainer.dead()
    assert (work.kind, work.group_id, work.reason, work.cause, work.epoch) == ("train", "poison", reason, "failed", 1)
    assert [attempt.replica for attempt in work.attempts] == ["rollout-1", "rollout-2"]


def test_work_can_be_buried_with_a_reason_once(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    trainer.issue([an_item("g0")])
    [lease] = run.take(replica)
    for _ in range(2):
        run.wait(replica.bury(lease, "the prompt has 9000 tokens"))
    assert [(work.group_id, work.reason) for work in trainer.dead()] == [("g0", "the prompt has 9000 tokens")]
    assert trainer.in_flight("train") == InFlight(waiting=0, leased=0, finished=0)


def test_a_newer_trainer_gives_dead_work_another_chance_and_the_record_stays(run: Run) -> None:
    old, replica = run.trainer(epoch=1), run.replica()
    old.issue([an_item("g0")])
    [lease] = run.take(replica)
    run.wait(replica.bury(lease, "engine died"))
    new = run.trainer(epoch=2)
    assert new.dead() == []
    assert new.issue([an_item("g0")]) == ["new"]
    assert [work.group_id for work in run.view.dead()] == ["g0"]


def damage(run: Run, stream: str, group_id: str, crc: str, data: bytes) -> None:
    """Replace the only entry of a stream, as bad memory or a stranger might."""
    [(entry_id, _)] = run.redis.xrange(stream)
    consumer_groups = run.redis.xinfo_groups(stream)
    run.redis.delete(stream)
    run.redis.xadd(stream, {"group_id": group_id, "crc": crc, "data": data}, id=entry_id)
    if consumer_groups:
        run.redis.xgroup_create(stream, CONSUMER_GROUP, "0")


def test_a_damaged_group_is_quarantined_and_issued_again(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    trainer.issue([an_item("g0")])
    [lease] = run.take(replica)
    run.wait(replica.submit(lease, a_group(lease)))
    data = a_group(lease).to_bytes()
    damage(run, run.keys.groups("train"), "g0", checksum("g0", data), data.replace(b"rollout-0", b"rollout-9"))
    assert trainer.read_groups("train", "0", 0, 10) == []
    assert [(work.group_id, work.cause) for work in run.view.dead()] == [("g0", "corrupt")]
    assert trainer.dead() == []
    assert trainer.issue([an_item("g0")]) == ["new"]


@pytest.mark.parametrize(("crc", "cause"), [("0", "corrupt"), (checksum("g0", b"\xc1"), "failed")])
def test_work_that_cannot_be_decoded_is_buried(run: Run, crc: str, cause: Literal["corrupt", "failed"]) -> None:
    trainer = run.trainer()
    trainer.issue([an_item("g0")])
    damage(run, run.keys.work("train"), "g0", crc, b"\xc1")
    assert run.take(run.replica()) == []
    assert [(work.group_id, work.cause) for work in run.view.dead()] == [("g0", cause)]
    assert trainer.issue([an_item("g0")]) == ["new"]


# Fencing and idempotence ---------------------------------------------------------------------------


def test_an_old_trainer_can_issue_publish_commit_and_evict_nothing(run: Run) -> None:
    old, replica = run.trainer(epoch=7), run.replica()
    old.issue([an_item("g0")])
    [lease] = run.take(replica)
    run.wait(replica.submit(lease, a_group(lease)))
    run.wait(replica.announce(a_member()))
    [(entry_id, _)] = old.read_groups("train", "0", 0, 10)
    member = old.members()["rollout-0"]
    run.trainer(epoch=8)
    for write in (
        old.open,
        lambda: old.issue([an_item("g1")]),
        lambda: old.publish(1, "digest"),
        lambda: old.commit("train", [(entry_id, "g0")]),
        lambda: old.evict(member),
    ):
        with pytest.raises(Fenced, match="epoch 7 was replaced by epoch 8"):
            write()
    assert run.view.in_flight("train") == InFlight(waiting=0, leased=0, finished=1)
    assert (run.view.policy(), list(run.view.members())) == (None, ["rollout-0"])


def test_the_fence_never_falls_even_in_a_redis_that_forgot_it(run: Run) -> None:
    new = run.trainer(epoch=8)
    run.redis.delete(run.keys("fence"))
    new.issue([])
    new.publish(1, "digest")
    assert run.view.highest_epoch() == 8


def test_issued_twice_is_once(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    assert trainer.issue([an_item("g0"), an_item("g1")]) == ["new", "new"]
    lease = run.take(replica)[0]
    run.wait(replica.submit(lease, a_group(lease)))
    assert trainer.issue([an_item("g0"), an_item("g1"), an_item("g2")]) == ["submitted", "issued", "new"]
    assert trainer.in_flight("train") == InFlight(waiting=1, leased=1, finished=1)


def test_commit_removes_exactly_the_groups_it_names(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    trainer.issue([an_item(f"g{i}") for i in range(4)])
    for lease in run.take(replica):
        run.wait(replica.submit(lease, a_group(lease)))
    entries = [(entry_id, group.group_id) for entry_id, group in trainer.read_groups("train", "0", 0, 10)]
    assert trainer.commit("train", [entries[0], entries[2]]) == 2
    assert trainer.commit("train", [entries[0], entries[2]]) == 0
    assert [group.group_id for _, group in trainer.read_groups("train", "0", 0, 10)] == ["g1", "g3"]


def test_a_policy_version_never_falls_within_an_epoch_and_may_in_the_next(run: Run) -> None:
    trainer = run.trainer(epoch=1)
    trainer.publish(5, "five")
    trainer.publish(5, "five")
    with pytest.raises(Exception, match="policy version 4 is older than the committed 5"):
        trainer.publish(4, "four")
    assert run.view.policy() == Policy(epoch=1, version=5, digest="five")
    run.trainer(epoch=2).publish(4, "four")
    assert run.view.policy() == Policy(epoch=2, version=4, digest="four")


# Members, progress, stop ---------------------------------------------------------------------------


def test_progress_and_the_request_to_stop_are_seen_by_all(run: Run) -> None:
    trainer = run.trainer()
    assert (run.view.progress(), trainer.stop_requested()) == ({}, None)
    trainer.set_progress(phase="training", step=3)
    request_stop(run.redis, run.run_id, "Ctrl-C")
    assert run.view.progress() == {"phase": "training", "step": "3"}
    assert trainer.stop_requested() == "Ctrl-C"
    clear_stop(run.redis, run.run_id)
    assert trainer.stop_requested() is None


def test_the_oldest_lease_names_its_holder_and_its_idle_time(run: Run) -> None:
    assert run.view.oldest_lease("train") is None
    run.trainer().issue([an_item("g0"), an_item("g1")])
    for name in ("rollout-0", "rollout-1"):
        run.take(run.replica(name), 1)
    lease = run.view.oldest_lease("train")
    assert lease is not None
    assert (lease.replica, lease.deliveries) == ("rollout-0", 1)
    assert 0 <= lease.idle_s < 60
    assert run.view.in_flight("train") == InFlight(waiting=0, leased=2, finished=0)


def test_withdrawn_validation_is_forgotten_and_training_is_not(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    trainer.issue([an_item("v0-0", kind="validation"), an_item("v0-1", kind="validation"), an_item("g0")])
    training, leased, submitted = run.take(replica)
    run.wait(replica.submit(submitted, a_group(submitted)))
    assert trainer.withdraw("validation") == 2
    assert run.wait(replica.submit(leased, a_group(leased))) == "unknown"
    assert trainer.read_groups("validation", "0", 0, 10) == []
    assert (trainer.in_flight("validation").waiting, trainer.in_flight("validation").leased) == (0, 0)
    assert run.wait(replica.submit(training, a_group(training))) == "stored"
    assert trainer.issue([an_item("v0-0", kind="validation")]) == ["new"]


def test_a_replica_that_waits_for_work_survives_a_withdrawal(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    run.wait(replica.declare())

    async def withdraw_while_it_waits() -> list[Lease]:
        waiting = asyncio.create_task(replica.take(1, 5.0))
        while not any(client["cmd"] == "xreadgroup" for client in run.redis.client_list()):
            await asyncio.sleep(0.01)
        trainer.withdraw("validation")
        trainer.issue([an_item("g0")])
        return await waiting

    assert [lease.item.group_id for lease in run.wait(withdraw_while_it_waits())] == ["g0"]
