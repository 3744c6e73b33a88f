"""What containers ask themselves, asked of a real reward service, a real rollout app and a real queue."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from retort.cli.health import main, reward_problem, rollout_problem, trainer_problem
from retort.queues import TrainerQueue, connect
from services.rollout.app import make_app
from services.rollout.weight_receiver import WeightReceiver
from tests.scripted_engine import ScriptedEngine

ROOT = Path(__file__).parents[2]
RUN_FILE = str(ROOT / "configs" / "tiny-cpu.toml")
STALL_S = 600.0
"""`timeouts.stall_s` of that run file."""


@pytest.fixture
def rollout_address() -> Iterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(WeightReceiver(ScriptedEngine())), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def queue(redis_url: str, run_id: str, monkeypatch: pytest.MonkeyPatch) -> TrainerQueue:
    """The queue of the run that the health check is asked about."""
    monkeypatch.setenv("RETORT_REDIS__URL", redis_url)
    monkeypatch.setenv("RETORT_RUN_ID", run_id)
    return TrainerQueue(connect(redis_url), run_id, epoch=1)


def say(queue: TrainerQueue, age_s: float) -> None:
    queue.set_progress(phase="training", step=7, waiting_for="", updated=time.time() - age_s)


def test_a_reward_service_is_healthy_until_it_ends(unused_port: int) -> None:
    address = f"127.0.0.1:{unused_port}"
    command = [sys.executable, "-m", "services.reward", "--port", str(unused_port)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as service:
        assert service.stderr
        ready = next(line for line in service.stderr if " ready " in line)
        assert address in ready
        assert reward_problem(address) == ""
        service.terminate()
    assert reward_problem(address) == f"the reward service at {address} does not answer: UNAVAILABLE"


def test_a_rollout_server_is_healthy_before_it_has_weights(rollout_address: str) -> None:
    assert rollout_problem(rollout_address) == ""


def test_a_rollout_server_that_does_not_listen_yet_is_not_healthy(unused_port: int) -> None:
    assert "Connection refused" in rollout_problem(f"127.0.0.1:{unused_port}")


def test_a_trainer_that_spoke_a_minute_ago_is_healthy(queue: TrainerQueue) -> None:
    say(queue, age_s=60)
    assert trainer_problem(RUN_FILE) == ""


def test_a_trainer_that_was_silent_for_too_long_is_not_healthy(queue: TrainerQueue) -> None:
    say(queue, age_s=STALL_S + 10)
    assert trainer_problem(RUN_FILE) == (
        "the trainer has said nothing new for 610 s (timeouts.stall_s = 600); "
        "last: training, step 7, waiting for nothing"
    )


def test_a_trainer_that_has_not_begun_is_not_healthy(queue: TrainerQueue) -> None:
    assert trainer_problem(RUN_FILE) == "the trainer has not said anything yet"


def test_without_redis_the_trainer_is_not_healthy(unused_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_REDIS__URL", f"redis://127.0.0.1:{unused_port}")
    assert trainer_problem(RUN_FILE).startswith("No Redis answers at redis://127.0.0.1")


def test_the_exit_code_tells_and_the_reason_is_printed(
    rollout_address: str, unused_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollout", rollout_address]) == 0
    assert main(["rollout", f"127.0.0.1:{unused_port}"]) == 1
    assert capsys.readouterr().out.startswith("healthy\nthe rollout server at 127.0.0.1")
