"""The launcher with real processes: what dies is restarted, and in the end nothing is left."""

import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from retort.cli.status import read_status
from retort.config import RunConfig, dump_config
from retort.telemetry import LAUNCHER_PID

SMALL_RUN = Path(__file__).with_name("small_run.py")


class Launched:
    """A launcher that runs, seen from outside."""

    def __init__(self, run_dir: Path, process: subprocess.Popen[str]) -> None:
        self.run_dir = run_dir
        self.process = process

    def status(self) -> dict:
        return json.loads((self.run_dir / "status.json").read_text())

    def pid(self, name: str) -> int:
        return next(p["pid"] for p in self.status()["processes"] if p["name"] == name)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: (self.run_dir / "status.json").exists() and self.status()["step"] >= step)

    def finish(self, timeout_s: float = 240.0) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output

    def descendants(self) -> list[psutil.Process]:
        """Every process of this launcher, wherever it hangs in the tree."""
        # Valkey writes its title over its environment, but it works in the run directory.
        found = []
        for process in psutil.process_iter():
            try:
                named = process.environ().get(LAUNCHER_PID) == str(self.process.pid)
                if named or process.cwd().startswith(str(self.run_dir)):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


def write_run_file(tmp_path: Path, steps: int, trackers: Sequence[str] = (), **timeouts: float) -> Path:
    config = RunConfig.model_validate(
        {
            "name": "small",
            "trackers": list(trackers),
            "run_dir": str(tmp_path / "run"),
            "model": {"path": "none"},
            "data": {"train": "none", "validation": "none"},
            "trainer": {"steps": steps},
            "timeouts": timeouts,
        }
    )
    run_file = tmp_path / "small.toml"
    run_file.write_text(dump_config(config))
    return run_file


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    launched: list[Launched] = []

    def start(
        behaviour: str = "works", *, steps: int = 20, trackers: Sequence[str] = (), path: str = "", **timeouts: float
    ) -> Launched:
        run_file = write_run_file(tmp_path, steps, trackers, **timeouts)
        env = {key: value for key, value in os.environ.items() if key != "REDIS_URL"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (path, env.get("PYTHONPATH"))))
        process = subprocess.Popen(
            [sys.executable, str(SMALL_RUN), str(run_file), behaviour],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        launched.append(Launched(tmp_path / "run", process))
        return launched[-1]

    yield start
    for run in launched:
        if run.process.poll() is None:
            run.process.kill()
            run.process.communicate()


def test_a_run_tells_its_story_and_leaves_nothing(start) -> None:
    run = start(steps=5)
    run.wait_for_step(1)
    code, output = run.finish()
    assert code == 0, output
    assert "Valkey ready on 127.0.0.1:" in output
    assert "reward service ready on 127.0.0.1:" in output
    assert "rollout-0: engine loaded" in output
    assert "weights verified on 1 replica" in output
    assert "validation before training: avg@16 0.250" in output
    assert "step 5/5  reward 0.500" in output
    assert "avg@16 0.250 before training, 0.300 at version 5 (+0.050)" in output
    status = run.status()
    assert (status["phase"], status["step"], status["exit_code"], status["processes"]) == ("done", 5, 0, [])
    assert run.descendants() == []


@pytest.mark.parametrize("victim", ["redis", "reward", "rollout-0", "trainer"])
def test_what_dies_is_restarted_and_the_run_goes_on(start, victim: str) -> None:
    run = start(steps=40)
    run.wait_for_step(3)
    killed = run.pid(victim)
    os.kill(killed, signal.SIGKILL)
    run.wait_until(lambda: run.pid(victim) not in (None, killed))
    restarts = {process["name"]: process["restarts"] for process in run.status()["processes"]}
    assert restarts == {"redis": 0, "reward": 0, "rollout-0": 0, "trainer": 0} | {victim: 1}
    code, output = run.finish()
    assert code == 0, output
    assert f"{victim} was killed by SIGKILL; starting it again in 0.5 s (restart 1" in output
    assert run.descendants() == []


def test_a_service_that_keeps_dying_ends_the_run_and_is_named(start) -> None:
    run = start("dies", max_restarts=1)
    code, output = run.finish()
    assert code == 1
    assert "giving up: trainer was killed by SIGKILL, after 1 restarts within ten minutes" in output
    assert "the tokenizer has no tokens" in output
    assert "logs/trainer.log" in output
    assert run.status()["exit_code"] == 1
    assert run.descendants() == []


def test_a_tracker_that_keeps_failing_does_not_end_the_run(start, tmp_path: Path) -> None:
    (tmp_path / "trackio.py").write_text("raise OSError('the database is locked')")
    run = start(steps=20, trackers=["trackio"], path=str(tmp_path), max_restarts=0)
    run.wait_for_step(1)
    run.wait_until(lambda: run.pid("trackio") is None)
    code, output = run.finish()
    assert code == 0, output
    assert "trackio ended with exit code 1; the run goes on without it (log " in output
    assert "the database is locked" in (run.run_dir / "logs/trackio.log").read_text()
    assert run.descendants() == []


def test_the_trainers_exit_code_and_last_words_are_passed_on(start) -> None:
    run = start("diverges")
    code, output = run.finish()
    assert code == 5
    assert "trainer ended with exit code 5" in output
    assert "diverged: 8 updates in a row had a non-finite gradient norm" in output
    assert run.descendants() == []


def test_a_run_that_hangs_ends_and_says_who_waits_for_whom(start) -> None:
    run = start("hangs", stall_s=1.5)
    code, output = run.finish()
    assert code == 4, output
    assert "the trainer (phase 'train', step 2) waits for groups from rollout-0" in output
    assert "retort doctor: trainer waits for groups from rollout-0, since" in output
    assert run.descendants() == []


def test_a_trainer_that_never_speaks_ends_the_run_after_the_startup_limit(start) -> None:
    run = start("dies", startup_s=1.0, max_restarts=50)
    code, output = run.finish()
    assert code == 4, output
    assert "not ready after 1 s" in output
    assert run.descendants() == []


def test_one_interrupt_finishes_the_step_and_says_how_to_resume(start) -> None:
    run = start(steps=400)
    run.wait_for_step(3)
    run.process.send_signal(signal.SIGINT)
    code, output = run.finish()
    assert code == 130
    assert "then saving; press Ctrl-C again to stop at once" in output
    assert "small.toml --resume" in output
    assert "The report so far: " in output and (run.run_dir / "report.html").exists()
    assert (run.status()["phase"], run.status()["exit_code"]) == ("stopped", 130)
    assert run.descendants() == []


def test_a_second_interrupt_stops_at_once(start) -> None:
    run = start("deaf", steps=400)
    run.wait_for_step(3)
    run.process.send_signal(signal.SIGTERM)
    run.wait_until(lambda: run.status()["phase"] == "stopping")
    run.process.send_signal(signal.SIGINT)
    code, output = run.finish(timeout_s=10)
    assert code == 130
    assert "the beginning (no checkpoint yet)" in output
    assert run.descendants() == []


def test_a_resumed_run_says_how_many_steps_it_made_itself(start, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/step-000003").mkdir(parents=True)
    code, output = start(steps=5).finish()
    assert code == 0, output
    assert "done: 2 steps (to 5) in 0:0" in output


class Typed:
    """A launcher in a terminal of its own, and everything that was drawn there."""

    def __init__(self, run_file: Path, behaviour: str) -> None:
        self._keys, self.terminal = os.openpty()
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
        self.before = termios.tcgetattr(self.terminal)
        self.process = subprocess.Popen(
            [sys.executable, str(SMALL_RUN), str(run_file), behaviour],
            stdin=self.terminal,
            stdout=self.terminal,
            stderr=self.terminal,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - no other thread holds a lock
            env={**os.environ, "TERM": "xterm"},
        )
        self.drawn = ""

    def wait_for(self, text: str, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.drawn:
            assert time.monotonic() < deadline, f"no {text!r} within {timeout_s} s: {self.drawn}"
            if select.select([self._keys], [], [], 0.1)[0]:
                self.drawn += os.read(self._keys, 65536).decode(errors="replace")

    def type(self, keys: bytes) -> None:
        os.write(self._keys, keys)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._keys)
        os.close(self.terminal)


@pytest.fixture
def typed(tmp_path: Path) -> Iterator[Callable[[str], Typed]]:
    opened: list[Typed] = []

    def open_terminal(behaviour: str) -> Typed:
        opened.append(Typed(write_run_file(tmp_path, steps=400), behaviour))
        return opened[-1]

    yield open_terminal
    for terminal in opened:
        terminal.close()


def test_ctrl_c_in_a_terminal_is_not_drawn_into_the_panel(typed) -> None:
    run = typed("works")
    run.wait_for("of 400, train")
    assert not termios.tcgetattr(run.terminal)[3] & termios.ECHOCTL
    run.type(b"\x03")
    run.wait_for("To resume from")
    assert run.process.wait(timeout=20) == 130
    assert "^C" not in run.drawn
    assert termios.tcgetattr(run.terminal) == run.before


def test_a_second_ctrl_c_is_answered_before_anything_is_stopped(typed) -> None:
    run = typed("deaf")
    run.wait_for("of 400, train")
    run.type(b"\x03")
    run.wait_for("press Ctrl-C again to stop at once")
    run.type(b"\x03")
    run.wait_for("stopping at once", timeout_s=5)
    run.wait_for("To resume from")
    assert run.drawn.index("stopping at once") < run.drawn.index("stopped at once after")
    assert run.process.wait(timeout=20) == 130
    assert termios.tcgetattr(run.terminal) == run.before


def test_a_killed_launcher_leaves_no_process(start) -> None:
    run = start(steps=400)
    run.wait_for_step(3)
    run.wait_until(lambda: len(run.descendants()) == 5)  # the four, and what the rollout service started
    below = run.descendants()
    names = {p["name"] for p in run.status()["processes"]}
    assert names == {"redis", "reward", "rollout-0", "trainer"}
    run.process.kill()
    run.process.communicate()
    _, alive = psutil.wait_procs(below, timeout=5)
    assert alive == []
    status = read_status(run.run_dir)
    assert (status["phase"], {process["state"] for process in status["processes"]}) == ("died", {"gone"})


def test_a_service_that_died_leaves_nothing_below_it(start) -> None:
    run = start("loose", steps=400)
    run.wait_for_step(3)
    killed = psutil.Process(run.pid("rollout-0"))
    run.wait_until(lambda: len(killed.children(recursive=True)) == 1)
    below = killed.children(recursive=True)
    killed.kill()
    psutil.wait_procs(below, timeout=5)
    run.wait_until(lambda: run.pid("rollout-0") not in (None, killed.pid))
    assert not below[0].is_running()


def fleet(run: Launched, *words: str) -> str:
    command = [sys.executable, "-m", "retort.cli", "fleet", *words, "--run-dir", str(run.run_dir)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_replica_that_is_drained_leaves_and_is_not_started_again(start) -> None:
    run = start(steps=400)
    run.wait_for_step(1)
    run.wait_until(lambda: "rollout-0  serving  0 " in fleet(run))
    assert fleet(run, "drain", "rollout-0").startswith("rollout-0 is asked to leave")
    run.wait_until(lambda: run.pid("rollout-0") is None)
    [state] = [process["state"] for process in run.status()["processes"] if process["name"] == "rollout-0"]
    assert state == "exited"
    assert "rollout-0" not in fleet(run)
    run.wait_for_step(run.status()["step"] + 10)  # a restart would take five of them
    assert run.pid("rollout-0") is None
    run.process.send_signal(signal.SIGINT)
    code, output = run.finish()
    assert (code, "rollout-0 has left" in output) == (130, True)


def test_a_replica_that_is_evicted_is_started_again(start) -> None:
    run = start(steps=400)
    run.wait_for_step(1)
    run.wait_until(lambda: "rollout-0  serving  0 " in fleet(run))
    evicted = run.pid("rollout-0")
    assert fleet(run, "evict", "rollout-0").startswith("rollout-0 is evicted")
    run.wait_until(lambda: run.pid("rollout-0") not in (None, evicted))
    run.wait_until(lambda: "rollout-0  serving  0 " in fleet(run))
    run.process.send_signal(signal.SIGINT)
    assert run.finish()[0] == 130


def test_a_directory_is_used_by_one_launcher_at_a_time(start) -> None:
    first = start(steps=400)
    first.wait_for_step(1)
    second = start(steps=400)
    _, output = second.finish()
    assert "is in use by another `retort run`" in output
    assert first.process.poll() is None
