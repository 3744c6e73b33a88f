"""`make kill-demo`: one run is left alone, another is killed at random; both print the same SHA-256."""

import hashlib
import json
import sys
import time

import pytest

from tests.chaos.conftest import MakeRun, chaos_seed
from tests.chaos.faults import Chaos
from tests.chaos.run import ChaosRun

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
STEPS = 24
KILLS = 20
KINDS = {"kill replica": 4, "kill reward": 2, "kill trainer": 4, "kill redis": 3, "kill launcher": 2}


def sha256(run: ChaosRun) -> str:
    """Of parameters, teacher, optimizer, exported weights, metrics and groups."""
    return hashlib.sha256(json.dumps(run.results(), sort_keys=True).encode()).hexdigest()


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_sha_256(
    chaos_config, make_run: MakeRun, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()

    def say(text: str) -> None:
        with capfd.disabled():
            sys.stdout.write(f"\n{time.monotonic() - begun:6.1f} s  {text}")
            sys.stdout.flush()

    say(f"two runs of {STEPS} steps, seed {chaos_seed()}; the first is left alone")
    undisturbed = make_run(chaos_config(STEPS), "undisturbed")
    undisturbed.start()
    assert undisturbed.finish() == 0
    say(f"undisturbed  {sha256(undisturbed)}")
    undisturbed.close()

    disturbed = make_run(chaos_config(STEPS), "disturbed")
    chaos = Chaos(disturbed, chaos_seed())
    disturbed.start()
    while disturbed.launcher.poll() is None and len(chaos.hits) < KILLS:
        done = len(chaos.hits)
        chaos.do(done + 1, KINDS)
        for hit in chaos.hits[done:]:
            say(f"{hit.kind:<14} while the trainer was {hit.state}, after step {max(disturbed.last_step(), 0)}")
    assert chaos.finish() == 0
    say(f"{len(chaos.hits):2} kills     {sha256(disturbed)}")
    assert sha256(disturbed) == sha256(undisturbed)
    disturbed.check_exactly_once()
    disturbed.close()
