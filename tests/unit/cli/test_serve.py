"""`retort serve reward` is the reward service itself, with its own arguments."""

import subprocess
import sys


def test_the_arguments_reach_the_service() -> None:
    serve = [sys.executable, "-m", "retort.cli", "serve", "reward", "--port", "0", "--help"]
    shown = subprocess.run(serve, capture_output=True, text=True, timeout=60, check=True)
    assert "usage:" in shown.stdout
    assert "--host" in shown.stdout


def test_only_services_that_stand_on_their_own_can_be_served() -> None:
    serve = [sys.executable, "-m", "retort.cli", "serve", "trainer"]
    refused = subprocess.run(serve, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "invalid choice: 'trainer'" in refused.stderr
