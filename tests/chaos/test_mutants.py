"""Planted bugs: each is put into a copy of the sources, and the tests that are named must find it there, every time.

The copy is all that is changed; the product has no switch for any of them.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos import again
from tests.e2e.launched_run import ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
COPIED = ("retort", "services", "tests", "models", "data", "configs", "pyproject.toml")
QUEUES = "tests/integration/test_queues.py"
READER = "tests/integration/test_group_reader.py"
SAMPLER = "tests/integration/test_sampler.py"
SENDER = "tests/integration/test_weight_sender.py"
LUA = "retort/queues/functions.lua"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    right: str
    wrong: str
    tests: str
    """Which of the suite's tests are asked; the file that covers the place."""


MUTANTS = [
    Mutant(
        "work is acknowledged when it is taken",
        LUA,
        "      lease(kind, entry, 1)\n",
        "      lease(kind, entry, 1)\n      redis.call('XACK', stream, CONSUMER_GROUP, entry[1])\n",
        QUEUES,
    ),
    Mutant("a group may be submitted twice", LUA, "  if work then\n    add(", "  if true then\n    add(", QUEUES),
    Mutant(
        "groups are trained on in the order of their arrival",
        "services/trainer/admission.py",
        "return [self._groups[item.group_id] for item in items]",
        "return [group for name, group in self._groups.items() if name in awaited]",
        READER,
    ),
    Mutant(
        "a replica samples with whatever weights it has",
        "retort/rollouts.py",
        "return self.step - 1 if self.kind",
        "return self.step + 99 if self.kind",
        SAMPLER,
    ),
    Mutant(
        "groups leave Redis when they are read",
        "services/trainer/admission.py",
        "                self._groups[group.group_id] = group\n",
        "                self._groups[group.group_id] = group\n"
        "                self.queue.commit(self.kind, [(entry_id, group.group_id)])\n",
        READER,
    ),
    Mutant(
        "a trainer reads from the live end of the stream",
        "services/trainer/admission.py",
        '_cursor: str = "0"',
        '_cursor: str = "$"',
        READER,
    ),
    Mutant("an old trainer is not refused by Redis", LUA, "if tonumber(epoch) < tonumber(highest)", "if false", QUEUES),
    Mutant(
        "an old trainer may write files",
        "services/trainer/fence.py",
        "if (newest := _epoch_in(file)) > self.epoch:",
        "if (newest := _epoch_in(file)) < 0:",
        "tests/unit/trainer/test_fence.py",
    ),
    Mutant(
        "an epoch is given out twice",
        "services/trainer/fence.py",
        "max(_epoch_in(file), highest_elsewhere) + 1",
        "highest_elsewhere + 1",
        "tests/unit/trainer/test_fence.py",
    ),
    Mutant(
        "a version is served before it is verified",
        "services/rollout/weight_receiver.py",
        'await self._move("verifying")',
        'await self._move("serving")',
        "tests/unit/rollout/test_weight_receiver.py",
    ),
    Mutant(
        "digests are not compared",
        "services/trainer/weight_sender.py",
        "if digests[:buckets] != snapshot.digests[:buckets]:",
        "if len(digests) < buckets:",
        SENDER,
    ),
    Mutant(
        "adapters are added to any base",
        "services/trainer/weight_sender.py",
        "if digests != snapshot.digests:",
        "if len(digests) != len(snapshot.digests):",
        "tests/integration/test_lora.py",
    ),
    Mutant(
        "the probe is not compared",
        "services/trainer/weight_sender.py",
        "if gap > self._config.max_probe_gap:",
        "if gap > math.inf:",
        SENDER,
    ),
    Mutant(
        "a damaged checkpoint is loaded",
        "services/trainer/checkpoint.py",
        "if _digest(directory / name) != digest:",
        "if not (directory / name).exists():",
        "tests/unit/trainer/test_checkpoint.py",
    ),
    Mutant(
        "a run with damaged checkpoints starts from zero",
        "services/trainer/checkpoint.py",
        'return "damaged" if candidates else None',
        "return None",
        "tests/unit/trainer/test_checkpoint.py",
    ),
    Mutant(
        "groups leave Redis before the checkpoint is written",
        "services/trainer/train.py",
        '    with journal.timing("checkpoint"):\n        checkpoints.save(policy, teacher)\n',
        '    steps.release(policy.version)\n    with journal.timing("checkpoint"):\n'
        "        checkpoints.save(policy, teacher)\n",
        "tests/unit/trainer/test_train.py",
    ),
    Mutant(
        "metrics of steps that are trained again stay",
        "services/trainer/journal.py",
        'if version and line["step"] <= version]',
        "if version]",
        "tests/unit/trainer/test_journal.py",
    ),
    Mutant(
        "issuing twice queues twice",
        LUA,
        "    if state then\n      table.insert(found",
        "    if false then\n      table.insert(found",
        QUEUES,
    ),
    Mutant(
        "the fence falls in a Redis that forgot it",
        LUA,
        "  if epoch ~= highest then\n",
        "  if false then\n",
        QUEUES,
    ),
    Mutant(
        "a replica announces itself before it listens",
        "services/rollout/__main__.py",
        "        listening.listen()\n",
        "        pass\n",
        "tests/integration/test_rollout_server.py",
    ),
    Mutant(
        "work of a later step is left in the queue of a resumed run",
        LUA,
        "if readable and item.step > tonumber(args[2])",
        "if false",
        "tests/integration/test_takeover_of_the_queue.py",
    ),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mutants")
    for name in COPIED:
        source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__")
        (shutil.copytree if source.is_dir() else shutil.copy)(
            source, directory / name, **({"ignore": ignored} if source.is_dir() else {})
        )
    return directory


def run(directory: Path, selection: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The tests, there. Anything but passing or failing is an error of this test."""
    environment = {**os.environ, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=60", *options, selection]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.mark.parametrize("selection", sorted({mutant.tests for mutant in MUTANTS}))
def test_the_tests_that_are_to_find_the_bugs_pass_without_them(copy: Path, selection: str) -> None:
    done = run(copy, selection, "-x")
    assert done.returncode == 0, done.stdout[-1500:]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_found_every_time(copy: Path, mutant: Mutant) -> None:
    file = copy / mutant.file
    right = file.read_text()
    assert right.count(mutant.right) == 1, f"{mutant.file} has changed: {mutant.right!r} is there no more"
    file.write_text(right.replace(mutant.right, mutant.wrong))
    try:
        # The first test that finds it, and that one again and again.
        first = run(copy, mutant.tests, "-x").stdout
        found = re.search(r"^FAILED (.+?)(?: - .*)?$", first, re.MULTILINE)
        assert found, f"it survived {mutant.tests}:\n{first[-1500:]}"
        # Some bugs make a test wait for what never comes; without the bug it takes a second or two.
        again_and_again = run(copy, found[1], "-p", "tests.chaos.again", "--tb=no", "--timeout=20")
        last_line = again_and_again.stdout.splitlines()[-1]
    finally:
        file.write_text(right)
    assert re.match(rf"{again.TIMES} failed in ", last_line), f"{found[1]}: {last_line}"
