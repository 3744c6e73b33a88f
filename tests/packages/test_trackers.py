"""The trackers with their real packages, none of which needs a network: `make test-packages`.

Each has an environment of its own with what `pip install "retort[NAME]"` brings.
"""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tests.finished_run import AVG, a_config, write_run
from tests.reward_service import ROOT

pytestmark = [pytest.mark.packages, pytest.mark.timeout(900)]

REWARD = "critic/score/mean"


class Installed:
    """A tracker in an environment of its own, and a run of three steps."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = [*project["dependencies"], *project["optional-dependencies"][name]]
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=120)
        self.python = folder / "venv/bin/python"
        subprocess.run([self.python, "-m", "pip", "install", "--quiet", *wanted], check=True, timeout=600)
        self.run_dir = folder / "letters"
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "WANDB_MODE": "offline",
            "TRACKIO_DIR": str(folder / "trackio"),
        }
        write_run(self.run_dir, a_config(self.run_dir), [0.25, 0.5, 0.75])

    def track(self, *flags: str) -> subprocess.Popen[str]:
        command = [self.python, "-m", "retort.cli", "track", self.run_dir, "--to", self.name, *flags]
        return subprocess.Popen(
            command, cwd=self.run_dir.parent, env=self.environment, stderr=subprocess.PIPE, text=True
        )  # fmt: skip

    def read(self, metric: str) -> list[list[float]]:
        """[step, value] of each entry, as the package itself reads what it has written."""
        program = ROOT / "tests/packages/tracker_program.py"
        command = [self.python, program, self.name, self.run_dir, metric]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=200, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(params=["wandb", "tensorboard", "mlflow", "trackio"])
def tracker(request: pytest.FixtureRequest, tmp_path: Path) -> Installed:
    return Installed(request.param, tmp_path)


def write(run_dir: Path, *lines: dict) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_it_holds_every_step_once_after_two_starts_and_a_run_that_went_on(tracker: Installed) -> None:
    once = tracker.track()
    assert once.wait(timeout=300) == 0, once.communicate()[1][-3000:]

    write(tracker.run_dir, {"step": 3, REWARD: 0.5}, {"step": 4, REWARD: 0.625}, {"step": 3, AVG: 0.8})
    following = tracker.track("--follow")
    place = tracker.run_dir / f"trackers/{tracker.name}.json"
    deadline = time.monotonic() + 200
    while json.loads(place.read_text()) != {"step": 4, "validated": 3}:
        assert following.poll() is None, following.communicate()[1][-3000:]
        assert time.monotonic() < deadline, place.read_text()
        time.sleep(0.1)
    following.send_signal(signal.SIGTERM)
    assert following.wait(timeout=150) == 0, following.communicate()[1][-3000:]

    assert tracker.read(REWARD) == [[1, 0.25], [2, 0.375], [3, 0.5], [4, 0.625]]
    assert [[step, round(value, 6)] for step, value in tracker.read(AVG)] == [[0, 0.25], [1, 0.5], [2, 0.75], [3, 0.8]]
