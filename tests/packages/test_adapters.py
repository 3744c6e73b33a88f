"""The adapters, called by the packages that they are for: `make test-packages`.

The packages are installed beside the project's own, for their processes alone (requirements/trainers.txt).
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reward_service import ROOT, Service, reward_service

pytestmark = [pytest.mark.packages, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, "-r", str(ROOT / "requirements/trainers.txt")], check=True, timeout=600)
    return folder


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with reward_service() as running:
        yield running


def run(packages: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{packages}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests/packages" / program), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip


def test_trl_trains_with_the_rewards_and_leaves_out_what_has_none(
    packages: Path, service: Service, tmp_path: Path
) -> None:
    done = run(packages, "trl_program.py", service.address, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    assert len(printed["rewards"]) == 4
    # Two completions of one prompt; the rows with an empty answer are unscorable.
    assert set(printed["rewards"]) <= {0.0, 1.0, None}
    assert "rewards/retort_mcq/mean" in printed["metrics"]


def test_verl_loads_the_function_by_its_path_and_gets_the_score(packages: Path, service: Service) -> None:
    done = run(packages, "verl_program.py", service.address, "B")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "reward_score": 1.0,
        "reward_extra_info": {"score": 1.0, "acc": 1.0, "pred": "B", "format_ok": 1.0},
    }


def test_verl_hears_of_a_sample_without_a_reward(packages: Path, service: Service) -> None:
    done = run(packages, "verl_program.py", service.address, "")
    assert done.returncode == 1
    assert "UnscorableError: item 0 is unscorable: answer is empty" in done.stderr


def test_verifiers_gets_rewards_and_not_0_where_there_is_none(packages: Path, service: Service) -> None:
    done = run(packages, "verifiers_program.py", service.address)
    assert done.returncode == 0, done.stderr[-3000:]
    right, wrong, unscorable = json.loads(done.stdout.splitlines()[-1])
    assert right == [1.0, {"retort_mcq": 1.0}]
    assert wrong == [0.0, {"retort_mcq": 0.0}]
    assert math.isnan(unscorable[0])
