import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from services.trainer.policy import Policy
from services.trainer.teacher import Teacher
from tests.training import a_config, a_language_model


def a_policy(mesh: DeviceMesh) -> Policy:
    return Policy(a_language_model(), a_config().trainer, mesh, dtype=torch.float64, temperature=1.0)


def move_by(policy: Policy, distance: float) -> None:
    for shard in policy.local_shards():
        shard.add_(distance)


def test_the_teacher_begins_as_the_policy_and_does_not_move_with_it(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    teacher = Teacher(policy)
    before = [shard.clone() for shard in policy.local_shards()]
    move_by(policy, 1.0)
    assert all(torch.equal(*pair) for pair in zip(teacher.shards, before, strict=True))


def test_it_follows_by_its_rate(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    teacher = Teacher(policy)
    before = [shard.clone() for shard in teacher.shards]
    move_by(policy, 1.0)
    teacher.follow(policy, rate=0.05, finite_updates=1)
    for shard, old in zip(teacher.shards, before, strict=True):
        torch.testing.assert_close(shard, old + 0.05)


def test_after_a_step_without_a_finite_update_it_stays(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    teacher = Teacher(policy)
    before = [shard.clone() for shard in teacher.shards]
    move_by(policy, 1.0)
    teacher.follow(policy, rate=0.05, finite_updates=0)
    assert all(torch.equal(*pair) for pair in zip(teacher.shards, before, strict=True))


def test_in_place_of_the_policy_its_weights_score_and_afterwards_each_has_its_own(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    teacher = Teacher(policy)
    as_teacher = policy.score_prompt([1, 2, 3])
    with torch.no_grad():
        for shard in policy.local_shards():
            shard.mul_(1.5)
    as_policy = policy.score_prompt([1, 2, 3])
    assert as_policy != pytest.approx(as_teacher, abs=1e-3)
    with teacher.in_place_of(policy.local_shards()):
        assert policy.score_prompt([1, 2, 3]) == as_teacher
    assert policy.score_prompt([1, 2, 3]) == as_policy


def test_an_error_while_it_scores_leaves_the_policy_its_weights(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    teacher = Teacher(policy)
    move_by(policy, 1.0)
    own = [shard.clone() for shard in policy.local_shards()]
    with pytest.raises(KeyError), teacher.in_place_of(policy.local_shards()):
        raise KeyError
    assert all(torch.equal(*pair) for pair in zip(policy.local_shards(), own, strict=True))
