"""The documents: every link leads somewhere, every shell block is known and, where that is possible, run."""

import os
import re
import shlex
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import yaml

from retort.cli.__main__ import COMMANDS, _parser
from tests.unit.test_architecture import relative, repository_files

ROOT = Path(__file__).parents[2]
PAGES = repository_files(".md")

RUN_BY = {
    "docs/reward-api.md": "tests/integration/test_reward_docs.py",
    "services/reward/README.md": "tests/integration/test_reward_docs.py",
}
"""Page -> the test that runs each of its blocks."""

RUN_HERE = [
    ("docs/extending.md", "retort checker new my_checker"),
    ("docs/extending.md", "retort task new symbols"),
    ("docs/extending.md", "retort plan configs/tiny-cpu.toml"),
]
"""(page, beginning of a block) that is run as it stands."""

NOT_RUN = {
    ("CONTRIBUTING.md", "make setup"): "runs this test",
    ("README.md", "make demo"): "sets up anew, and then runs this test; .ci/run does it on a fresh clone",
    ("README.md", ".venv/bin/retort chat"): "asks the model of a run; each has a test of its own in tests/unit/cli",
    ("deploy/README.md", ".venv/bin/retort prepare"): "downloads the questions, for a host with eight GPUs",
    ("deploy/README.md", "docker compose cp"): "needs a second machine",
    ("deploy/README.md", "kubectl create namespace"): "needs a cluster; tests/unit/test_kubernetes.py checks the files",
    ("deploy/README.md", "sbatch"): "needs a cluster",
    ("docs/extending.md", "retort run"): "trains for minutes; tests/e2e/test_run.py trains on a new task",
    ("docs/data.md", "retort run"): "trains on questions of the reader; tests/e2e/test_run.py trains on the demo's",
    ("docs/index.md", "make demo"): "trains for minutes; tests/e2e/test_run.py",
    ("docs/operations.md", "retort run"): "trains for minutes; tests/e2e/test_run.py",
    ("docs/reference-run.md", "retort prepare"): "downloads, and trains on eight GPUs for hours",
    ("docs/smollm2.md", ""): "needs a model of 270 MB from a package registry",
    ("models/smollm2/README.md", ""): "needs a model of 270 MB from a package registry",
}
"""(page, beginning of a block) -> why it is not run."""


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


BLOCKS = [(relative(page), block) for page in PAGES for block in blocks(page)]


def is_listed(page: str, block: str, known: tuple[str, str]) -> bool:
    return page == known[0] and block.startswith(known[1])


def retort_lines(block: str) -> list[list[str]]:
    """The words after `retort` of every command of the block that begins with it."""
    joined = block.replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in re.split(r"\n|&&|;", joined) if "retort " in line]
    return [words[1:] for words in commands if words and Path(words[0]).name == "retort"]


def test_every_shell_block_is_run_or_says_why_not() -> None:
    known = [*RUN_HERE, *NOT_RUN]
    unknown = [
        f"{page}: {block.splitlines()[0]}"
        for page, block in BLOCKS
        if page not in RUN_BY and not any(is_listed(page, block, one) for one in known)
    ]
    assert unknown == []
    assert [one for one in known if not any(is_listed(page, block, one) for page, block in BLOCKS)] == []
    assert [test for test in RUN_BY.values() if not (ROOT / test).exists()] == []


@pytest.mark.parametrize("known", RUN_HERE, ids=lambda known: known[1])
def test_a_block_of_the_documents_runs(known: tuple[str, str], tmp_path: Path) -> None:
    [block] = [block for page, block in BLOCKS if is_listed(page, block, known)]
    for folder in ("configs", "models", "data"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    # The block's commands are this tree's, whatever the machine has on its PATH.
    here = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\nretort() {{ python -m retort.cli "$@"; }}\n'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = ["bash", "-e", "-c", here + block]
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(BLOCKS)])
def test_the_command_line_knows_every_command_and_flag_that_is_shown(page: str, block: str) -> None:
    for words in retort_lines(block):
        assert words[0] in COMMANDS, page
        _parser(words[0]).parse_args(words)  # ends the process on what it does not know


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_picture_on_the_site_says_what_the_diagram_says() -> None:
    [(page, diagram)] = [
        (relative(page), block)
        for page in PAGES
        for block in re.findall(r"^```mermaid\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    assert page == "docs/architecture.md"
    picture = (ROOT / "docs" / "one-step.svg").read_text()
    drawn = "".join(unescape(re.sub("<[^>]+>", "", picture)).split())
    texts = re.findall(r"(?:: | as )(.+)$", diagram, re.MULTILINE)
    assert len(texts) == 19  # four who speak, fifteen messages
    assert [text for text in texts if "".join(text.split()) not in drawn] == []


def test_every_page_is_in_the_site() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w-]+\.md", str(site["nav"])))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}
