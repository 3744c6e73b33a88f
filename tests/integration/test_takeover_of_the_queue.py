"""What a trainer finds, leaves and takes back in the queue of a trainer that it replaces."""

from typing import Any

import pytest

from retort.queues import Fenced
from tests.integration.queue_run import Run, a_group, an_item, group_ids


def test_work_of_later_steps_is_withdrawn_and_what_is_finished_stays(run: Run) -> None:
    trainer, replica = run.trainer(), run.replica()
    later, finished = an_item("later", step=3), an_item("finished", step=3)
    trainer.issue([finished, later, an_item("now", step=2)])
    [lease] = run.take(replica, 1)
    run.wait(replica.submit(lease, a_group(lease)))
    [held] = run.take(replica, 1)
    assert (held.item.group_id, trainer.withdraw_later(2)) == ("later", 1)
    assert group_ids(run.take(replica)) == ["now"]
    assert run.wait(replica.submit(held, a_group(held))) == "unknown"
    assert trainer.issue([finished, later]) == ["submitted", "new"]


def test_every_accepted_call_of_a_trainer_is_in_the_audit_and_no_refused_one(run: Run) -> None:
    old, new = run.trainer(epoch=7), run.trainer(epoch=8)
    new.publish(1, "digest")
    with pytest.raises(Fenced):
        old.publish(2, "other")
    audit: Any = run.redis.xrange(run.keys("audit"))
    found = [(int(fields[b"epoch"]), fields[b"call"].decode()) for _, fields in audit]
    assert found == [(7, "open"), (8, "open"), (8, "publish")]
