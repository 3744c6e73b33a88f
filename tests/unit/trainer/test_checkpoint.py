import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from retort.config import ConfigError, MethodConfig
from services.trainer.checkpoint import MANIFEST, Checkpoints
from services.trainer.policy import Policy
from services.trainer.teacher import Teacher
from services.trainer.update import update_policy
from tests.training import a_batch, a_config, a_group, a_language_model, a_rollout


def a_policy(mesh: DeviceMesh, seed: int = 0) -> tuple[Policy, Teacher]:
    policy = Policy(a_language_model(seed), a_config().trainer, mesh, dtype=torch.float64, temperature=1.0)
    return policy, Teacher(policy)


def with_first_weight(policy: Policy, value: float) -> None:
    policy.local_shards()[0].fill_(value)


def first_weight(policy: Policy) -> float:
    return policy.local_shards()[0].flatten()[0].item()


def test_the_best_stay_beside_the_last_and_of_equals_the_newer(mesh: DeviceMesh, tmp_path: Path) -> None:
    policy, teacher = a_policy(mesh)
    scores = {0: 0.9, 1: 0.5, 2: 0.7, 3: 0.7}
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=2, scores=lambda: scores)

    def kept_after(version: int) -> list[str]:
        policy.version = version
        checkpoints.save(policy, teacher)
        return sorted(path.name for path in tmp_path.iterdir())

    assert kept_after(1) == ["step-000001"]
    assert kept_after(2) == ["step-000001", "step-000002"]
    assert kept_after(3) == ["step-000002", "step-000003"]
    scores[4] = 0.1
    assert kept_after(4) == ["step-000002", "step-000003", "step-000004"]
    assert kept_after(5) == ["step-000002", "step-000003", "step-000005"]
    scores[5] = 0.8
    assert kept_after(6) == ["step-000003", "step-000005", "step-000006"]


@pytest.fixture
def three_saved(mesh: DeviceMesh, tmp_path: Path) -> Path:
    """Versions 1, 2 and 3 of a run that keeps three; the first weight of each is its version."""
    policy, teacher = a_policy(mesh)
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for version in (1, 2, 3):
        policy.version = version
        with_first_weight(policy, version)
        checkpoints.save(policy, teacher)
    return tmp_path


def loaded(mesh: DeviceMesh, directory: Path) -> tuple[int, float]:
    policy, teacher = a_policy(mesh, seed=1)
    assert Checkpoints(directory, keep_last=3).load(policy, teacher)
    return policy.version, first_weight(policy)


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "rank-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "rank-0.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def remove_tensors(checkpoint: Path) -> None:
    (checkpoint / "rank-0.safetensors").unlink()


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def change_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text('{"version": 9, "ranks": 1, "optimizer_steps": 0}')


def garble_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text("{")


def empty_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text("{}")


def make_manifest_a_list(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text("[]")


DAMAGES = [
    flip_a_bit,
    truncate,
    remove_tensors,
    remove_manifest,
    change_state,
    garble_manifest,
    empty_manifest,
    make_manifest_a_list,
]


def test_the_newest_checkpoint_is_loaded(mesh: DeviceMesh, three_saved: Path) -> None:
    assert loaded(mesh, three_saved) == (3, 3.0)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_loudly_for_the_one_before(
    mesh: DeviceMesh, three_saved: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(three_saved / "step-000003")
    with caplog.at_level(logging.ERROR, logger="retort"):
        assert loaded(mesh, three_saved) == (2, 2.0)
    [record] = caplog.records
    assert record.getMessage() == "checkpoint_damaged"
    assert record.__dict__["fields"]["path"] == three_saved / "step-000003"


def test_what_a_killed_save_left_behind_is_ignored_and_cleared_by_the_next(mesh: DeviceMesh, three_saved: Path) -> None:
    leftover = three_saved / "step-000004.unfinished"
    leftover.mkdir()
    (leftover / "rank-7.safetensors").write_bytes(b"torn")
    assert loaded(mesh, three_saved) == (3, 3.0)

    policy, teacher = a_policy(mesh)
    policy.version = 4
    with_first_weight(policy, 4.0)
    Checkpoints(three_saved, keep_last=3).save(policy, teacher)
    assert not leftover.exists()
    assert loaded(mesh, three_saved) == (4, 4.0)
    assert sorted(file.name for file in (three_saved / "step-000004").iterdir()) == [
        MANIFEST,
        "rank-0.safetensors",
        "state.json",
    ]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_zero(mesh: DeviceMesh, three_saved: Path) -> None:
    for checkpoint in three_saved.iterdir():
        flip_a_bit(checkpoint)
    policy, teacher = a_policy(mesh)
    with pytest.raises(ConfigError, match="no checkpoint is whole"):
        Checkpoints(three_saved, keep_last=3).load(policy, teacher)


def test_a_run_without_checkpoints_says_so(mesh: DeviceMesh, tmp_path: Path) -> None:
    policy, teacher = a_policy(mesh)
    assert Checkpoints(tmp_path / "checkpoints", keep_last=1).load(policy, teacher) is False


def test_older_checkpoints_go_once_a_newer_one_is_there(mesh: DeviceMesh, tmp_path: Path) -> None:
    policy, teacher = a_policy(mesh)
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for version in (8, 9, 10, 11):
        policy.version = version
        checkpoints.save(policy, teacher)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000011"]


def test_saving_a_version_again_replaces_it(mesh: DeviceMesh, three_saved: Path) -> None:
    policy, teacher = a_policy(mesh)
    policy.version = 3
    with_first_weight(policy, 33.0)
    Checkpoints(three_saved, keep_last=3).save(policy, teacher)
    assert loaded(mesh, three_saved) == (3, 33.0)


def test_the_manifest_names_every_other_file(three_saved: Path) -> None:
    manifest = json.loads((three_saved / "step-000003" / MANIFEST).read_text())
    assert manifest.keys() == {"rank-0.safetensors", "state.json"}


def test_the_optimizer_goes_on_where_it_was(mesh: DeviceMesh, tmp_path: Path) -> None:
    """One update, save, load, one update: the same bits as two updates in a row."""
    batch = a_batch([a_group(a_rollout([5, 6], reward=1.0))], [0.5])
    batch.old_logprobs = batch.teacher_logprobs = batch.rollout_logprobs

    def update(policy: Policy) -> None:
        update_policy(policy, batch, [0], MethodConfig(), learning_rate=1e-2)

    undisturbed, teacher = a_policy(mesh)
    update(undisturbed)
    Checkpoints(tmp_path, keep_last=1).save(undisturbed, teacher)
    update(undisturbed)
    resumed, other_teacher = a_policy(mesh, seed=1)
    Checkpoints(tmp_path, keep_last=1).load(resumed, other_teacher)
    update(resumed)
    for ours, theirs in zip(resumed.local_shards(), undisturbed.local_shards(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(other_teacher.shards, teacher.shards, strict=True):
        assert torch.equal(ours, theirs)
