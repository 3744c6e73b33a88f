"""Every command that the documents show is run, as it stands, against a service on other ports."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reward_service import ROOT, Service, reward_service

pytestmark = pytest.mark.timeout(120)

DOCUMENTS = ("services/reward/README.md", "docs/reward-api.md")
INSTALLATION = "python3.11 -m venv"
"""Beginning of the block that is run by tests/packages/test_install.py, because it downloads."""
CERTIFICATE = "reward.pem"
"""In the blocks that go together: the files that a secured service needs, and its callers."""


def blocks(language: str, secured: bool = False) -> list[str]:
    texts = [(ROOT / document).read_text() for document in DOCUMENTS]
    return [
        block
        for text in texts
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        if not block.startswith(INSTALLATION) and (CERTIFICATE in block) == secured
    ]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with reward_service("--http-port", "0") as running:
        yield running


def here(text: str, service: Service) -> str:
    http = service.http.partition("://")[2]
    text = text.replace("127.0.0.1:8081", http).replace("127.0.0.1:50051", service.address)
    # The documents' `retort` is this tree's, whatever the machine has on its PATH.
    return text.replace("reward-env/bin/retort", f"{shlex.quote(sys.executable)} -m retort.cli")


@pytest.mark.parametrize("block", blocks("sh"), ids=range(len(blocks("sh"))))
def test_a_command_of_the_documents_runs(block: str, service: Service, tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", here(block, service)],
        cwd=tmp_path, env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "Score" in block or "/v1/score" in block:
        results = json.loads(done.stdout)["results"]
        assert [result for result in results if "reward" in result]
        by_id = {result["id"]: result.get("reward") for result in results}
        assert by_id.get("right", 1.0) == 1.0
        assert by_id.get("wrong", 0.0) == 0.0
        assert by_id.get("typo") is None
        assert by_id.get("program", 1.0) == by_id.get("formula", 1.0) == by_id.get("both", 1.0) == 1.0


@pytest.mark.parametrize("block", blocks("python"), ids=range(len(blocks("python"))))
def test_a_program_of_the_documents_runs(block: str, service: Service) -> None:
    done = subprocess.run(
        [sys.executable, "-c", here(block, service)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "reward=1.0" in done.stdout


def test_the_files_of_a_secured_service_are_made_and_used_as_the_documents_say(tmp_path: Path) -> None:
    if not shutil.which("curl") or not shutil.which("openssl"):
        pytest.skip("curl or openssl is not installed")
    make, call = blocks("sh", secured=True)
    (program,) = blocks("python", secured=True)
    subprocess.run(["bash", "-e", "-c", make], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    cert, key, tokens = (str(tmp_path / name) for name in (CERTIFICATE, "reward.key", "tokens"))
    with reward_service("--http-port", "0", "--tls-cert", cert, "--tls-key", key, "--token-file", tokens) as running:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        for command in (["bash", "-e", "-c", here(call, running)], [sys.executable, "-c", here(program, running)]):
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
            )
            assert "reward=1.0" in done.stdout or '"reward":1.0' in done.stdout, done.stderr
