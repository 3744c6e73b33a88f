import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from services.rollout.engine_sockets import make_socket_directory


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_every_engine_has_a_directory_that_nobody_else_may_enter(tmp_path: Path) -> None:
    first, second = make_socket_directory(), make_socket_directory()
    assert first != second
    assert {path.parent for path in (first, second)} == {tmp_path}
    assert first.stat().st_mode & 0o777 == 0o700


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    left, used = (tmp_path / f"retort-engine-{pid}-x" for pid in (killed.pid, os.getppid()))
    foreign = tmp_path / "retort-engine-z"
    for directory in (left, used, foreign):
        directory.mkdir()
        (directory / "socket").touch()
    make_socket_directory()
    assert not left.exists()
    assert used.exists()
    assert foreign.exists()
