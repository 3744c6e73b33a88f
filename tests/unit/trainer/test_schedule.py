import pytest
import torch

from services.trainer.schedule import learning_rate, reweight_lambda, update_sizes, update_teacher


def test_no_decay_steps_mean_no_decay() -> None:
    assert [reweight_lambda(step, initial=0.5, decay_steps=0) for step in (1, 50, 1000)] == [0.5, 0.5, 0.5]


def test_lambda_starts_whole_and_falls_to_zero() -> None:
    assert [reweight_lambda(step, initial=0.5, decay_steps=2) for step in (1, 2, 3, 4)] == [0.5, 0.25, 0.0, 0.0]


def test_the_first_step_of_a_warmup_learns_nothing() -> None:
    assert [learning_rate(step, base=8.0, warmup_steps=4) for step in (1, 2, 4, 5, 6)] == [0.0, 2.0, 6.0, 8.0, 8.0]


def test_without_warmup_the_rate_is_whole_at_once() -> None:
    assert learning_rate(1, base=1e-3, warmup_steps=0) == 1e-3


def test_the_reference_run_makes_32_updates_of_64_sequences_on_any_number_of_ranks() -> None:
    for ranks in (1, 2, 3, 8):
        sizes = update_sizes(groups_per_step=256, groups_per_update=8, group_size=8, ranks=ranks)
        assert (sizes.updates_per_step, sizes.sequences_per_update) == (32, 64)


def test_the_teacher_moves_by_its_rate_towards_the_policy_in_place() -> None:
    teacher = torch.tensor([1.0, 0.0])
    update_teacher([teacher], [torch.tensor([3.0, -4.0])], rate=0.25, finite_updates=1)
    assert teacher.tolist() == [1.5, -1.0]


def test_a_step_without_a_finite_update_leaves_the_teacher() -> None:
    teacher = torch.tensor([1.0])
    update_teacher([teacher], [torch.tensor([float("nan")])], rate=0.25, finite_updates=0)
    assert teacher.tolist() == [1.0]


def test_a_teacher_equal_to_the_policy_stays_so_bit_for_bit() -> None:
    policy = torch.linspace(-3, 3, 1001)
    teacher = policy.clone()
    update_teacher([teacher], [policy], rate=0.05, finite_updates=32)
    assert torch.equal(teacher, policy)


def test_changes_of_a_low_learning_rate_accumulate_in_float32() -> None:
    teacher, policy = torch.tensor([0.02]), torch.tensor([0.020001])
    for _ in range(40):
        update_teacher([teacher], [policy], rate=0.05, finite_updates=1)
    # 1 - 0.95^40 = 0.8715 of the way of 1e-6.
    assert (teacher.item() - 0.02) / 1e-6 == pytest.approx(0.8715, abs=0.05)


def test_a_bfloat16_policy_is_averaged_in_the_teachers_own_type() -> None:
    teacher = torch.tensor([0.0])
    update_teacher([teacher], [torch.tensor([1.0], dtype=torch.bfloat16)], rate=0.05, finite_updates=1)
    assert teacher.item() == pytest.approx(0.05, rel=1e-6)


def test_a_bfloat16_teacher_is_refused() -> None:
    teacher = torch.tensor([0.0], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"use torch\.float32"):
        update_teacher([teacher], [torch.tensor([1.0])], rate=0.05, finite_updates=1)


def test_a_missing_tensor_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        update_teacher([torch.zeros(1), torch.zeros(1)], [torch.zeros(1)], rate=0.05, finite_updates=1)
