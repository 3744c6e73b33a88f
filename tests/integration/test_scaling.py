"""What KEDA reads to scale the rollout replicas: the lag that Redis itself reports for the work stream."""

from retort.queues.protocol import CONSUMER_GROUP
from tests.integration.queue_run import Run, a_group, an_item


def lag(run: Run) -> int | None:
    [group] = run.redis.xinfo_groups(run.keys.work("train"))
    assert group["name"] == CONSUMER_GROUP.encode()
    return group["lag"]


def test_the_lag_is_the_work_that_nobody_has_taken(run: Run) -> None:
    run.trainer().issue([an_item(f"g{i}") for i in range(5)])
    assert lag(run) == 5
    replica = run.replica()
    first, _ = run.take(replica, 2)
    assert lag(run) == 3
    run.wait(replica.submit(first, a_group(first)))
    assert lag(run) == 3
    run.take(replica, 3)
    assert lag(run) == 0
