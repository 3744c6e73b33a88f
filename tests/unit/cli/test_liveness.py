import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from retort.cli.liveness import condition, identity

PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()']); print(flush=True); input()"


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[bytes]]:
    """A process with another below it; both wait for input that does not come."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        process.send_signal(signal.SIGCONT)
        process.kill()


def stopped(pid: int) -> None:
    """Wait until a signal that stops has had its effect."""
    deadline = time.monotonic() + 30
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline, f"process {pid} has not stopped within 30 s"
        time.sleep(0.01)


def test_a_process_that_was_stopped_is_frozen_until_it_goes_on(parent: subprocess.Popen[bytes]) -> None:
    seen = identity(parent.pid)
    assert condition(seen) == "running"
    parent.send_signal(signal.SIGSTOP)
    stopped(parent.pid)
    assert condition(seen) == condition(seen, alone=True) == "frozen"
    parent.send_signal(signal.SIGCONT)
    assert condition(seen) == "running"


def test_what_is_stopped_below_a_process_freezes_it_too_unless_it_is_asked_for_alone(
    parent: subprocess.Popen[bytes],
) -> None:
    seen = identity(parent.pid)
    [below] = psutil.Process(parent.pid).children()
    below.suspend()
    stopped(below.pid)
    assert (condition(seen), condition(seen, alone=True)) == ("frozen", "running")
    below.kill()


def test_a_process_that_ended_is_gone_and_one_of_another_host_is_unknown(parent: subprocess.Popen[bytes]) -> None:
    seen = identity(parent.pid)
    parent.kill()
    parent.wait()
    assert condition(seen) == condition(identity(None)) == "gone"
    assert condition({**seen, "host": "elsewhere"}) == "unknown"


def test_a_clock_that_is_set_makes_no_other_process_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, now = identity(os.getpid()), time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    assert condition(seen) == "running"
