"""The exit code of a trainer process reaches whoever started torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("last_act", "exit_code", "said"),
    [
        ("sys.exit(5)", 5, ""),
        ("os.kill(os.getpid(), 9)", 1, "rank 0 was killed by SIGKILL"),
    ],
)
def test_the_first_failure_decides_the_exit_code(tmp_path: Path, last_act: str, exit_code: int, said: str) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(f"import os, sys\n{last_act}\n")
    run = subprocess.run(
        [sys.executable, "-m", "retort.cli.torchrun", "--nproc-per-node", "1", "--standalone", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == exit_code, run.stderr
    assert run.stderr.strip() == said


def test_a_request_for_stacks_is_passed_on_to_the_ranks(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(
        "import time\nfrom retort.telemetry import start_logging\nstart_logging('trainer')\n"
        "def wait_here():\n    print('ready', flush=True)\n    time.sleep(60)\nwait_here()\n"
    )
    command = [sys.executable, "-m", "retort.cli.torchrun", "--nproc-per-node", "1", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline() == "ready\n"
        run.send_signal(signal.SIGUSR1)
        assert any("in wait_here" in line for line in run.stderr)
        run.terminate()


def test_a_torchrun_that_is_told_to_end_lets_its_ranks_save_and_says_which_signal_it_was(tmp_path: Path) -> None:
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    script = tmp_path / "trainer.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        f"    pathlib.Path({str(saved)!r}).touch()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "retort.cli.torchrun", "--nproc-per-node", "1", "--standalone", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert saved.exists()
