"""However groups arrive, the trainer gets each of a step's once, in slot order; or it learns why it will not."""

import re
from collections.abc import Callable

import pytest
from redis import Redis

from retort.queues import RolloutQueue
from retort.queues.protocol import checksum
from services.trainer import admission
from services.trainer.admission import GivenUpError, GroupReader, StalledError
from tests.integration.queue_run import Run, a_group, a_member, an_item

ITEMS = [an_item(f"0-{index:06d}") for index in range(4)]


def nothing(waited_s: float) -> None:
    """What a reader does while it waits."""


def a_reader(run: Run, idle: Callable[[float], None] = nothing, stall_s: float = 30.0) -> GroupReader:
    reader = GroupReader(run.trainer(), "train", idle, stall_s)
    reader.queue.issue(ITEMS)
    return reader


def submit_all(run: Run, replica: RolloutQueue, order: Callable[[list], list]) -> None:
    for lease in order(run.take(replica)):
        assert run.wait(replica.submit(lease, a_group(lease))) == "stored"


def ids(groups: list) -> list[str]:
    return [group.group_id for group in groups]


def test_groups_come_back_in_slot_order_however_they_arrived(run: Run) -> None:
    reader = a_reader(run)
    submit_all(run, run.replica(), order=lambda leases: leases[::-1])
    assert ids(reader.collect(ITEMS)) == ids(ITEMS)
    wanted = [ITEMS[2], ITEMS[0]]
    assert ids(reader.collect(wanted)) == ids(wanted)


def test_groups_that_arrive_while_waiting_are_waited_for(run: Run) -> None:
    replica = run.replica()
    leases = []

    def sample_one(_: float) -> None:
        if not leases:
            leases.extend(run.take(replica))
        if leases:
            lease = leases.pop()
            run.wait(replica.submit(lease, a_group(lease)))

    assert ids(a_reader(run, idle=sample_one).collect(ITEMS)) == ids(ITEMS)


def test_as_they_arrive_groups_come_in_whole_updates_in_the_order_of_arrival(run: Run) -> None:
    replica = run.replica()
    leases = []
    arrival = [ITEMS[index].group_id for index in (2, 0, 3, 1)]

    def sample_one(_: float) -> None:
        leases.extend(sorted(run.take(replica), key=lambda lease: arrival.index(lease.item.group_id)))
        if leases:
            lease = leases.pop(0)
            run.wait(replica.submit(lease, a_group(lease)))

    assert [ids(part) for part in a_reader(run, idle=sample_one).arrivals(ITEMS, 2)] == [arrival[:2], arrival[2:]]
    # A trainer that starts again finds them all there, and in the same order.
    assert [ids(part) for part in a_reader(run).arrivals(ITEMS, 2)] == [arrival]


def test_three_of_four_groups_make_one_update_of_two(run: Run) -> None:
    replica = run.replica()
    reader = a_reader(run)
    leases = run.take(replica)
    for lease in leases[:3]:
        run.wait(replica.submit(lease, a_group(lease)))
    parts = reader.arrivals(ITEMS, 2)
    assert ids(next(parts)) == ids(ITEMS[:2])
    run.wait(replica.submit(leases[3], a_group(leases[3])))
    assert ids(next(parts)) == ids(ITEMS[2:])


def test_what_another_step_left_behind_is_kept_for_it(run: Run) -> None:
    reader = a_reader(run)
    submit_all(run, run.replica(), order=list)
    assert ids(reader.collect(ITEMS[2:])) == ids(ITEMS[2:])
    assert ids(reader.collect(ITEMS[:2])) == ids(ITEMS[:2])


def test_a_group_that_came_twice_is_trained_once_and_released_wholly(run: Run) -> None:
    reader = a_reader(run)
    replica = run.replica()
    submit_all(run, replica, order=list)
    put_a_second_entry(run.redis, run, ITEMS[1].group_id)
    assert ids(reader.collect(ITEMS)) == ids(ITEMS)
    # The second entry lies after all that was awaited, so the next step finds it.
    next_step = [an_item("0-000009")]
    reader.queue.issue(next_step)
    submit_all(run, replica, order=list)
    assert ids(reader.collect(next_step)) == ["0-000009"]
    assert run.view.in_flight("train").finished == 6
    reader.release(lambda group: True)
    assert run.view.in_flight("train").finished == 0


def put_a_second_entry(redis: Redis, run: Run, group_id: str) -> None:
    """What a Redis that forgot and a replica that submitted again leave behind."""
    stream = run.keys.groups("train")
    [fields] = [fields for _, fields in redis.xrange(stream) if fields[b"group_id"] == group_id.encode()]
    assert fields[b"crc"].decode() == checksum(group_id, fields[b"data"])
    redis.xadd(stream, fields)


def test_what_redis_forgot_is_issued_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "ISSUE_AGAIN_S", 0.1)
    replica = run.replica()
    forgotten = []

    def forget_then_sample(_: float) -> None:
        if not forgotten:
            run.empty()
            forgotten.append(True)
        for lease in run.take(replica):
            run.wait(replica.submit(lease, a_group(lease)))

    assert ids(a_reader(run, idle=forget_then_sample).collect(ITEMS)) == ids(ITEMS)


def test_work_that_was_given_up_ends_the_wait_naming_group_and_reason(run: Run) -> None:
    reader = a_reader(run)
    replica = run.replica()
    run.wait(replica.bury(run.take(replica)[2], "the prompt is longer than the engine takes"))
    with pytest.raises(GivenUpError, match="0-000002 was given up: the prompt is longer than the engine takes") as end:
        reader.collect(ITEMS)
    assert (end.value.item, end.value.reason) == (ITEMS[2], "the prompt is longer than the engine takes")


def test_dead_work_of_another_step_does_not_end_the_wait(run: Run) -> None:
    reader = a_reader(run)
    replica = run.replica()
    leases = run.take(replica)
    run.wait(replica.bury(leases[3], "bad"))
    for lease in leases[:3]:
        run.wait(replica.submit(lease, a_group(lease)))
    assert ids(reader.collect(ITEMS[:3])) == ids(ITEMS[:3])


def test_a_stall_says_what_is_missing_and_who_is_there(run: Run) -> None:
    reader = a_reader(run, stall_s=0.3)
    replica = run.replica("rollout-3")
    run.wait(replica.announce(a_member("rollout-3")))
    run.let_member_fall_silent("rollout-3", 42)
    [first, *_] = run.take(replica, limit=1)
    run.wait(replica.submit(first, a_group(first)))
    run.take(replica, limit=1)
    with pytest.raises(StalledError) as raised:
        reader.collect(ITEMS)
    text = str(raised.value)
    assert "trainer waits for 3 train groups (first 0-000001)" in text
    assert "2 wait for a replica, 1 are being sampled" in text
    assert re.search(r"replicas: rollout-3 loading, heard of 4\d s ago", text)


def test_a_stall_without_replicas_says_so(run: Run) -> None:
    with pytest.raises(StalledError, match="replicas: none"):
        a_reader(run, stall_s=0.1).collect(ITEMS)


def test_every_arrival_starts_the_patience_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "POLL_S", 0.25)
    replica = run.replica()
    leases = []

    def sample_slowly(_: float) -> None:
        if not leases:
            leases.extend(run.take(replica))
        if leases:
            lease = leases.pop()
            run.wait(replica.submit(lease, a_group(lease)))

    # Four groups, each found after one poll of 0.25 s without any: one second in all, and never 0.8 s without one.
    assert len(a_reader(run, idle=sample_slowly, stall_s=0.8).collect(ITEMS)) == 4


def test_release_removes_exactly_what_a_checkpoint_holds(run: Run) -> None:
    reader = a_reader(run)
    submit_all(run, run.replica(), order=list)
    reader.collect(ITEMS)
    reader.release(lambda group: group.group_id in ("0-000000", "0-000002"))
    left = [group.group_id for _, group in reader.queue.read_groups("train", "0", 0, 10)]
    assert left == ["0-000001", "0-000003"]
    reader.release(lambda group: True)
    assert reader.queue.read_groups("train", "0", 0, 10) == []
