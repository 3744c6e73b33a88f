"""The first minute with the reward service: the first block of its README, as it stands, in a copy of the tree."""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.reward_service import ROOT

pytestmark = [pytest.mark.packages, pytest.mark.timeout(600)]

BODY = {"items": [{"id": "1", "checker": "mcq", "completion": "<answer>B</answer>", "answer": "B"}]}
CALL = """
import sys, json
from retort.client import Item, RewardClient
with RewardClient(sys.argv[1]) as client:
    (result,) = client.score([Item(checker="mcq", completion="<answer>B</answer>", answer="B")])
print(json.dumps(result.reward))
"""


def readme_block() -> tuple[str, str]:
    """The commands that install the service, and the one that starts it."""
    readme = (ROOT / "services" / "reward" / "README.md").read_text()
    block = re.findall(r"^```sh\n(.*?)\n```", readme, re.MULTILINE | re.DOTALL)[0]
    install, _, start = block.rpartition("\n")
    return install, start


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that the README makes, and beside it a file with the seconds that took."""
    folder = tmp_path_factory.mktemp("install")
    away = shutil.ignore_patterns(".*", "*.egg-info", "runs", "build")
    shutil.copytree(ROOT, folder / "clone", ignore=away)
    started = time.monotonic()
    install, _ = readme_block()
    subprocess.run(["bash", "-e", "-c", install], cwd=folder / "clone", check=True, timeout=500)
    (folder / "clone" / "seconds").write_text(str(time.monotonic() - started))
    return folder / "clone" / "reward-env"


@pytest.fixture(scope="module")
def addresses(environment: Path) -> Iterator[dict[str, str]]:
    _, start = readme_block()
    command = shlex.split(start.replace("50051", "0").replace("8081", "0"))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=environment.parent, env=clean, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if " ready " in line)
        seconds = time.monotonic() - started
        yield {"seconds": str(seconds), **dict(word.split("=", 1) for word in line.split() if "=" in word)}
        process.terminate()
        assert process.wait(timeout=20) == 0


def test_it_is_small_and_has_neither_torch_nor_vllm(environment: Path) -> None:
    size = sum(path.stat().st_size for path in environment.rglob("*") if path.is_file() and not path.is_symlink())
    assert size < 200e6
    command = [environment / "bin/pip", "list", "--format=json"]
    listed = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert not {"torch", "vllm", "numpy", "transformers"} & {one["name"] for one in json.loads(listed.stdout)}


def test_it_gives_a_verdict_over_http_and_over_grpc_within_a_minute(
    environment: Path, addresses: dict[str, str]
) -> None:
    started = time.monotonic()
    answer = httpx.post(f"http://{addresses['http']}/v1/score", json=BODY, timeout=20)
    assert answer.json()["results"][0]["reward"] == 1.0
    call = [environment / "bin/python", "-c", CALL, addresses["address"]]
    called = subprocess.run(call, cwd=environment, capture_output=True, text=True, check=True, timeout=60)
    assert called.stdout == "1.0\n"
    before = float((environment.parent / "seconds").read_text()) + float(addresses["seconds"])
    assert before + time.monotonic() - started < 60
