"""Who is a member of a run, since when nobody has heard of it, and how it is struck off."""

import logging
import time

import msgspec
import pytest

from retort.queues import Evicted
from tests.integration.queue_run import Run, a_member


def test_an_evicted_process_cannot_return_but_its_successor_can(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    run.wait(replica.announce(a_member(incarnation="first")))
    trainer.evict(a_member(incarnation="first"))
    with pytest.raises(Evicted, match="rollout-0 was evicted"):
        run.wait(replica.announce(a_member(incarnation="first")))
    assert trainer.members() == {}
    run.wait(replica.announce(a_member(incarnation="second")))
    assert {member.incarnation for member in trainer.members().values()} == {"second"}


def test_a_late_eviction_does_not_strike_the_successor(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    run.wait(replica.announce(a_member(incarnation="second")))
    trainer.evict(a_member(incarnation="first"))
    assert {member.incarnation for member in trainer.members().values()} == {"second"}


@pytest.mark.parametrize("skew_s", [-3600.0, 0.0, 3600.0])
def test_a_member_is_as_old_as_its_last_word_whatever_the_clock_of_its_host_shows(run: Run, skew_s: float) -> None:
    trainer, replica = run.trainer(), run.replica()
    there = time.time() + skew_s
    run.wait(replica.announce(msgspec.structs.replace(a_member(updated=there), last_finished=there - 30)))
    [member] = trainer.members().values()
    now = time.time()
    assert 0 <= now - member.updated < 5
    assert 30 <= now - member.last_finished < 35
    assert member.alive(now, limit_s=5)
    run.let_member_fall_silent("rollout-0", 60)
    [member] = trainer.members().values()
    assert 60 <= time.time() - member.updated < 65
    assert not member.alive(time.time(), limit_s=10)


def test_a_replica_of_an_older_version_which_has_no_clock_but_its_own_is_seen_and_can_be_evicted(run: Run) -> None:
    run.redis.hset(run.keys("members"), "rollout-0", a_member(updated=100.0).to_bytes())
    trainer = run.trainer()
    assert trainer.members() == {"rollout-0": a_member(updated=100.0)}
    trainer.evict(a_member())
    assert trainer.members() == {}


def test_a_member_that_was_not_heard_of_for_too_long_is_dead() -> None:
    member = a_member(updated=100.0)
    assert member.alive(now=110.0, limit_s=10.0)
    assert not member.alive(now=110.5, limit_s=10.0)


def test_who_was_not_heard_of_for_an_hour_is_forgotten_by_the_next_version_and_may_come_back(run: Run) -> None:
    trainer = run.trainer()
    for name, silent_s in (("lost", 3601), ("quiet", 3000), ("well", 0)):
        run.wait(run.replica(name).announce(a_member(name)))
        run.let_member_fall_silent(name, silent_s)
    trainer.publish(1, "digest")
    assert set(trainer.members()) == {"quiet", "well"}
    run.wait(run.replica("lost").announce(a_member("lost")))
    assert set(trainer.members()) == {"lost", "quiet", "well"}


def test_a_member_that_this_version_cannot_read_is_left_out_and_named_once(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a rolling update, where a newer replica may have a state of which this process knows nothing."""
    trainer = run.trainer()
    run.wait(run.replica("well").announce(a_member("well")))
    odd = msgspec.msgpack.encode(msgspec.to_builtins(a_member("odd")) | {"state": "hibernating"})
    run.redis.hset(run.keys("members"), "odd", b"1.5 " + odd)
    run.redis.hset(run.keys("members"), "torn", b"1.5.2 " + odd)
    run.redis.hset(run.keys("members"), b"\xff", b"1.5 " + odd)
    caplog.set_level(logging.WARNING, logger="retort")
    assert set(trainer.members()) == set(trainer.members()) == {"well"}
    said = [r.__dict__["fields"] for r in caplog.records if r.getMessage() == "member_unreadable"]
    reasons = {fields["replica"]: fields["reason"] for fields in said}
    assert set(reasons) == {"b'odd'", "b'torn'", "b'\\xff'"}
    assert len(said) == 3
    assert "hibernating" in reasons["b'odd'"]
