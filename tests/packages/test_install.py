"""The first minute with the reward service, as its README has it: nothing but `pip install ".[reward]"`."""

import json
import os
import shutil
import subprocess
import sys
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


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the service in it, and the seconds that took."""
    folder = tmp_path_factory.mktemp("install")
    away = shutil.ignore_patterns(".*", "*.egg-info", "runs", "build")
    shutil.copytree(ROOT, folder / "clone", ignore=away)
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=120)
    install = [folder / "venv/bin/pip", "install", "--quiet", ".[reward]"]
    subprocess.run(install, cwd=folder / "clone", check=True, timeout=400)
    (folder / "seconds").write_text(str(time.monotonic() - started))
    return folder


@pytest.fixture(scope="module")
def addresses(environment: Path) -> Iterator[dict[str, str]]:
    command = [environment / "venv/bin/retort", "serve", "reward", "--grpc-port", "0", "--http-port", "0"]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=environment, env=clean, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if " ready " in line)
        seconds = time.monotonic() - started
        yield {"seconds": str(seconds), **dict(word.split("=", 1) for word in line.split() if "=" in word)}
        process.terminate()
        assert process.wait(timeout=20) == 0


def test_it_is_small_and_has_neither_torch_nor_vllm(environment: Path) -> None:
    site = environment / "venv"
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file() and not path.is_symlink())
    assert size < 200e6
    listed = subprocess.run([site / "bin/pip", "list", "--format=json"], capture_output=True, check=True, timeout=60)
    assert not {"torch", "vllm", "numpy", "transformers"} & {one["name"] for one in json.loads(listed.stdout)}


def test_it_gives_a_verdict_over_http_and_over_grpc_within_a_minute(
    environment: Path, addresses: dict[str, str]
) -> None:
    started = time.monotonic()
    answer = httpx.post(f"http://{addresses['http']}/v1/score", json=BODY, timeout=20)
    assert answer.json()["results"][0]["reward"] == 1.0
    call = [environment / "venv/bin/python", "-c", CALL, addresses["address"]]
    called = subprocess.run(call, cwd=environment, capture_output=True, text=True, check=True, timeout=60)
    assert called.stdout == "1.0\n"
    before = float((environment / "seconds").read_text()) + float(addresses["seconds"])
    assert before + time.monotonic() - started < 60
