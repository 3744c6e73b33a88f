"""What a program that nobody has read can do: nothing beyond its own process."""

import subprocess
import sys
import time

import pytest

from services.reward.checkers import Limits
from services.reward.isolation.program import Ended, run_program

LIMITS = Limits(seconds=0.5, memory_mib=128)


def run(source: str) -> Ended:
    return run_program([source], b"", LIMITS, may_exit=False)


def run_in_a_clean_process(source: str) -> str:
    """As the service does. A test session has loaded gRPC and torch, which abort when a fork is refused."""
    code = (
        "import sys; from services.reward.checkers import Limits;"
        "from services.reward.isolation.program import run_program;"
        "ended = run_program([sys.argv[1]], b'', Limits(seconds=0.5, memory_mib=128), may_exit=False);"
        "print(ended.how, ended.detail)"
    )
    ran = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True, timeout=60, check=True)
    return ran.stdout


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import os; os.fork()", "PermissionError"),
        ("import os\nwhile True: os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['ls'])", "PermissionError"),
        ("import os; os.execv('/bin/sh', ['sh'])", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
        ("import os; os.kill(-1, 9)", "PermissionError"),
        ("import os; os.setsid()", "PermissionError"),
        ("import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))", "PermissionError"),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "ValueError"),
        ("import socket; socket.socket()", "PermissionError"),
        ("import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", "PermissionError"),
        ("import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())", "PermissionError"),
        ("open('/etc/passwd').read()", "PermissionError"),
        ("open('/proc/self/environ').read()", "PermissionError"),
        ("open('new', 'w')", "PermissionError"),
        ("import os; os.chmod(os.__file__, 0o777)", "PermissionError"),
        ("x = 'a' * 10**9", "MemoryError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("class E(Exception):\n    def __str__(self): raise SystemExit\nraise E", "E"),
    ],
)
def test_what_it_may_not_do_raises(source: str, error: str) -> None:
    assert run_in_a_clean_process(source).startswith(f"raised {error}")


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import signal\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "import time; time.sleep(60)",
        "import threading; threading.Thread(target=__import__('time').sleep, args=(60,)).start()\nwhile True: pass",
    ],
)
def test_it_is_killed_at_its_time_limit(source: str) -> None:
    started = time.monotonic()
    assert run(source).how == "time_limit"
    assert time.monotonic() - started < 5


def test_endless_output_ends_it() -> None:
    ended = run("while True: print('x' * 1000)")
    assert (ended.how, len(ended.stdout) <= 1 << 20) == ("crashed", True)


@pytest.mark.parametrize(
    ("source", "how"),
    [
        ("import os; os.close(1); os.close(0)", "passed"),
        ("import os; os._exit(0)", "ended_early"),
        ("import sys; sys.exit(0)", "raised"),
        ("import os; os.abort()", "crashed"),
        ("import ctypes; ctypes.string_at(0)", "crashed"),
        ("import asyncio, json, threading; asyncio.run(asyncio.sleep(0))", "passed"),
    ],
)
def test_how_it_ended_is_told(source: str, how: str) -> None:
    assert run(source).how == how


def test_what_it_prints_and_reads_is_its_own() -> None:
    ended = run_program(["print(2 * int(input()))"], b"21\n", LIMITS, may_exit=True)
    assert (ended.how, ended.stdout) == ("passed", b"42\n")
