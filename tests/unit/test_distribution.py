"""What is given away: a wheel that, installed by itself, scores a completion."""

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make dist` builds them."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "uv", "build", "--quiet", "--no-build-isolation", "--offline", "--out-dir", str(out)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=120)
    return out


def test_the_wheel_holds_the_code_and_what_it_reads_and_nothing_else(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "retort/queues/functions.lua",
        "retort/queues/users.acl",
        "retort/cli/report/page.js",
        "retort/py.typed",
        "services/trainer/train.py",
    ):
        assert needed in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"retort", "services", "simulation"}


def test_the_sdist_is_there_too(dist: Path) -> None:
    assert len([*dist.glob("*.tar.gz")]) == 1


def test_the_wheel_in_an_environment_of_its_own_scores_a_completion(dist: Path, tmp_path: Path) -> None:
    """Its code is the wheel's; its dependencies, by a path file, are this environment's, and nothing is downloaded."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    [site] = environment.glob("lib/python*/site-packages")
    [wheel] = dist.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    here = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    (site / "zz-dependencies.pth").write_text(f"{here}\n")
    completions = tmp_path / "completions.jsonl"
    item = {"checker": "mcq", "completion": "Two protons. <answer>B</answer>", "answer": "B"}
    completions.write_text(json.dumps(item) + "\n")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = str(environment / "bin" / "python")

    def run(*arguments: str) -> str:
        command = [python, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=clean, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    files = run("-c", "import retort, services.reward; print(retort.__file__, services.reward.__file__)")
    assert files.count(str(site)) == 2
    serve = [python, "-m", "retort.cli", "serve", "reward"]
    with subprocess.Popen(serve, cwd=tmp_path, env=clean, stderr=subprocess.PIPE, text=True) as service:
        assert service.stderr is not None
        try:
            ready = next(match for line in service.stderr if (match := re.search(r"ready address=(\S+)", line)))
            run("-m", "retort.cli", "score", "completions.jsonl", "results.jsonl", "--address", ready[1])
        finally:
            service.terminate()
    assert json.loads((tmp_path / "results.jsonl").read_text())["reward"] == 1.0
