"""What `retort fleet` asks of the queue: one process is meant, not whoever has its name next."""

import pytest

from retort.queues import Evicted, evict, request_drain
from tests.integration.queue_run import Run, a_member


def test_a_request_to_drain_reaches_the_process_that_was_meant(run: Run) -> None:
    replica = run.replica()
    assert run.wait(replica.announce(a_member(incarnation="first"))) == "ok"
    request_drain(run.redis, run.run_id, a_member(incarnation="first"))
    assert run.wait(replica.announce(a_member(incarnation="first"))) == "drain"
    assert run.wait(replica.announce(a_member(incarnation="second"))) == "ok"


def test_an_operator_evicts_in_the_name_of_the_present_trainer(run: Run) -> None:
    trainer, replica = run.trainer(epoch=7), run.replica()
    run.wait(replica.announce(a_member(incarnation="first")))
    evict(run.redis, run.run_id, a_member(incarnation="first"))
    assert trainer.members() == {}
    with pytest.raises(Evicted):
        run.wait(replica.announce(a_member(incarnation="first")))
    trainer.open()


def test_without_a_trainer_an_operator_can_evict_too(run: Run) -> None:
    replica = run.replica()
    run.wait(replica.announce(a_member(incarnation="first")))
    evict(run.redis, run.run_id, a_member(incarnation="first"))
    assert run.view.members() == {}
    run.trainer(epoch=1).open()
