"""A checkpoint holds the whole training state, whatever number of ranks wrote it and whatever number reads it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.integration.rank_programs import Arrays, load, load_then_train, train_and_save
from tests.integration.trainer_ranks import Ranks

RanksOf = Callable[[int], Ranks]


def assert_equal(state: Mapping[str, Arrays], expected: Mapping[str, Arrays], tolerance: float = 0.0) -> None:
    assert state.keys() == expected.keys() == {"policy", "teacher", "exp_avg", "exp_avg_sq", "step"}
    for part, tensors in expected.items():
        assert state[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(state[part][name], tensor, rtol=0, atol=tolerance, err_msg=f"{part}.{name}")


@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_what_two_ranks_saved_any_number_of_ranks_loads_bit_for_bit(
    ranks: RanksOf, tmp_path: Path, readers: int
) -> None:
    [saved, _] = ranks(2).run(train_and_save, tmp_path)
    assert all(np.abs(moment).max() > 0 for moment in saved["exp_avg"].values())
    assert any(np.abs(saved["teacher"][name] - tensor).max() > 0 for name, tensor in saved["policy"].items())
    for found, version, state in ranks(readers).run(load, tmp_path):
        assert (found, version) == (True, 7)
        assert_equal(state, saved)


def test_what_three_ranks_saved_one_loads(ranks: RanksOf, tmp_path: Path) -> None:
    saved = ranks(3).run(train_and_save, tmp_path)[0]
    [(_, _, state)] = ranks(1).run(load, tmp_path)
    assert_equal(state, saved)


def test_training_goes_on_alike_on_any_number_of_ranks(ranks: RanksOf, tmp_path: Path) -> None:
    ranks(2).run(train_and_save, tmp_path)
    [alone] = ranks(1).run(load_then_train, tmp_path)
    assert {float(step) for step in alone["step"].values()} == {3.0}
    for state in [*ranks(2).run(load_then_train, tmp_path), *ranks(3).run(load_then_train, tmp_path)]:
        assert_equal(state, alone, tolerance=1e-10)


def test_no_checkpoint_is_said_on_every_rank(ranks: RanksOf, tmp_path: Path) -> None:
    assert [(found, version) for found, version, _ in ranks(2).run(load, tmp_path / "none")] == [(False, 0)] * 2
