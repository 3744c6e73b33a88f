import pytest
import torch

from services.trainer.moments import merge, moments, std


def test_moments_are_count_mean_and_sum_of_squared_deviations() -> None:
    assert moments(torch.tensor([1.0, 2.0, 6.0])).tolist() == [3, 3, 4 + 1 + 9]


def test_merged_moments_are_those_of_the_union() -> None:
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([6.0]), torch.tensor([])]
    merged = merge(torch.stack([moments(part) for part in parts]))
    assert merged.tolist() == [3, 3, 14]
    assert std(merged).item() == pytest.approx((14 / 3) ** 0.5)


def test_the_deviation_of_equal_numbers_is_zero_however_they_are_split() -> None:
    value = torch.full((3,), 2.718281828459045, dtype=torch.float64)
    merged = merge(torch.stack([moments(value), moments(value[:2]), moments(value)]))
    assert std(merged).item() < 1e-15


def test_nothing_has_mean_and_deviation_zero() -> None:
    nothing = merge(torch.stack([moments(torch.tensor([]))] * 2))
    assert nothing.tolist() == [0, 0, 0]
    assert std(nothing).item() == 0
