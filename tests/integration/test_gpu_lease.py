"""deploy/compose/lease-gpu.sh: replicas of one service, each with GPUs of its own."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "compose" / "lease-gpu.sh"
SAY = 'echo "$CUDA_VISIBLE_DEVICES $RETORT_ROLLOUT__PORT $1"; exec cat'
"""Stands where the rollout server would: says what it was given and runs until its standard input ends."""

Replica = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Replica]]:
    """Starts a replica that may lease these GPUs."""
    replicas = []

    def start_one(gpus: str) -> Replica:
        environment = {"PATH": "/usr/bin:/bin", "GPUS": gpus, "LEASES": str(tmp_path), "TMPDIR": str(tmp_path)}
        replica = subprocess.Popen(
            ["sh", str(SCRIPT), "sh", "-c", SAY],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        replicas.append(replica)
        return replica

    yield start_one
    for replica in replicas:
        replica.kill()
        replica.communicate()


def given(replica: Replica) -> list[str]:
    """GPUs and port."""
    assert replica.stdout
    return replica.stdout.readline().split()[:2]


def test_each_replica_gets_another_gpu_and_another_port(start: Callable[[str], Replica], tmp_path: Path) -> None:
    assert given(start("6 7")) == ["6", "8000"]
    assert given(start("6 7")) == ["7", "8001"]
    assert (tmp_path / "port").read_text() == "8001\n"


def test_a_replica_may_have_several_gpus(start: Callable[[str], Replica]) -> None:
    assert given(start("4,5 6,7")) == ["4,5", "8000"]
    assert given(start("4,5 6,7")) == ["6,7", "8001"]


def test_one_replica_too_many_ends_and_says_why(start: Callable[[str], Replica]) -> None:
    given(start("6"))
    _, said = (surplus := start("6")).communicate()
    assert surplus.returncode == 3
    assert said.startswith("every one of the GPUs 6 is leased by another replica")


def test_the_gpu_of_a_killed_replica_is_free_again(start: Callable[[str], Replica]) -> None:
    first = start("6 7")
    assert given(first) == ["6", "8000"]
    first.kill()
    first.wait()
    assert given(start("6 7")) == ["6", "8000"]
