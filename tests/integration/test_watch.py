"""What a launcher sees of its run in a real Redis that an earlier launch has used."""

from pathlib import Path

from retort.cli.watch import RunWatch
from retort.queues import connect
from tests.integration.queue_run import Run, a_member
from tests.training import a_config


def test_what_an_earlier_launch_left_is_not_seen_and_a_clock_that_was_set_back_hides_nothing(
    redis_url: str, tmp_path: Path
) -> None:
    config = a_config(tmp_path).model_copy(update={"run_id": "watched"})
    run = Run(redis_url, config.key_prefix)
    trainer, replica = run.trainer(), run.replica()
    trainer.set_progress(phase="saving", updated=5000.0)
    run.wait(replica.announce(a_member(incarnation="first", updated=5000.0)))
    watch = RunWatch(config, connect(redis_url))
    watch.begin()
    assert (watch.look().progress, watch.look().members) == ({}, {})

    trainer.set_progress(phase="training", updated=1400.0)
    run.wait(replica.announce(a_member(incarnation="second", updated=1400.0)))
    seen = watch.look()
    assert seen.progress["phase"] == "training"
    assert [member.incarnation for member in seen.members.values()] == ["second"]
    run.close()
