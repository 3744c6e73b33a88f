import fcntl
import os
from pathlib import Path

import pytest
from torch.distributed.device_mesh import DeviceMesh

from retort.queues import Fenced
from services.trainer.admission import StalledError
from services.trainer.checkpoint import Checkpoints
from services.trainer.fence import Fence
from services.trainer.policy import Policy
from services.trainer.teacher import Teacher
from tests.unit.trainer.test_checkpoint import a_policy


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "epoch"


def a_fence(file: Path) -> Fence:
    return Fence(file, patience_s=0.1)


def test_every_trainer_gets_an_epoch_that_nobody_had_before(file: Path) -> None:
    assert [a_fence(file).take_over(highest_elsewhere) for highest_elsewhere in (0, 0, 9, 3)] == [1, 2, 10, 11]
    assert file.read_text() == "11"


def test_a_trainer_that_was_replaced_may_not_write(file: Path) -> None:
    old, new = a_fence(file), a_fence(file)
    old.take_over(0)
    with old.held():
        pass
    new.take_over(0)
    with pytest.raises(Fenced, match="epoch 1 was replaced by epoch 2"), old.held():
        raise AssertionError("it was let in")
    with new.held():
        pass


def test_nobody_takes_over_in_the_middle_of_a_write(file: Path) -> None:
    old = a_fence(file)
    old.take_over(0)
    with old.held(), pytest.raises(StalledError, match="another trainer has held the lock"):
        a_fence(file).take_over(0)
    assert a_fence(file).take_over(0) == 2


def test_the_lock_goes_with_its_holder(file: Path) -> None:
    a_fence(file).take_over(0)
    pid = os.fork()
    if pid == 0:
        fcntl.flock(os.open(file, os.O_RDWR), fcntl.LOCK_EX)
        os._exit(0)
    os.waitpid(pid, 0)
    assert a_fence(file).take_over(0) == 2


def save(policy: tuple[Policy, Teacher], directory: Path, fence: Fence) -> None:
    Checkpoints(directory, keep_last=2, fence=fence).save(*policy)


def test_the_checkpoint_of_a_trainer_that_was_replaced_changes_nothing(
    mesh: DeviceMesh, file: Path, tmp_path: Path
) -> None:
    old, new = a_fence(file), a_fence(file)
    old.take_over(0)
    new.take_over(0)
    directory = tmp_path / "checkpoints"
    save(a_policy(mesh, seed=1), directory, new)
    manifest = (directory / "step-000000" / "MANIFEST.json").read_text()
    with pytest.raises(Fenced):
        save(a_policy(mesh, seed=2), directory, old)
    assert (directory / "step-000000" / "MANIFEST.json").read_text() == manifest
