"""The two sides of a partition in the middle of a weight sync, each run in a network namespace of its own.

python -m tests.integration.partition_programs replica REDIS RUN PHASE
python -m tests.integration.partition_programs trainer REDIS RUN
"""

import json
import logging
import sys
import threading
import time

from tests.hosts.two_hosts import HEAD_ADDRESS, NODE_ADDRESS
from tests.integration.doomed_replica import READY_WITHIN_S, DoomedReplica, Fates
from tests.integration.queue_run import Run
from tests.integration.test_weight_sender import a_sender, assert_holds, publish
from tests.integration.torch_replica import TorchReplica


class Evictions(logging.Handler):
    """Keeps (replica, phase, reason) of each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "replica_evicted":
            fields = record.__dict__["fields"]
            self.seen.append((fields["replica"], fields["phase"], str(fields["reason"])))


def replica(run: Run, phase: str) -> None:
    """A member until it is cut off in the phase."""
    with DoomedReplica(run, phase, Fates.cut_off, NODE_ADDRESS):
        threading.Event().wait()


def trainer(run: Run) -> None:
    """Sends a version to it and to a replica of this host; prints what became of both."""
    logging.getLogger("retort").addHandler(evictions := Evictions())
    sender = a_sender(run, host=HEAD_ADDRESS)
    give_up = time.monotonic() + READY_WITHIN_S
    while "doomed" not in run.view.members():
        assert time.monotonic() < give_up, f"no replica within {READY_WITHIN_S:g} s"
        time.sleep(0.05)
    with TorchReplica(run, "well") as well:
        policy = publish(sender, 0)
        start = time.monotonic()
        serving = sender.sync()
        seconds = time.monotonic() - start
        assert_holds(well, policy)
        told = {"serving": serving, "seconds": seconds, "evicted": evictions.seen, "well": well.says_it_serves(0)}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    role, url, run_id, *phase = sys.argv[1:]
    if role == "replica":
        replica(Run(url, run_id), *phase)
    else:
        trainer(Run(url, run_id))
