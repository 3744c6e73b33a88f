import logging
import math

import pytest
import torch

from services.trainer.batch import StepBatch
from services.trainer.guards import DivergedError, Guards
from services.trainer.update import Update
from tests.training import a_batch, a_config, a_group, a_rollout


def guards(**limits: float) -> Guards:
    return Guards(a_config(trainer=limits).trainer)


def a_step(gaps: list[float], advantage: float = 0.5) -> StepBatch:
    """One row with an advantage whose trainer log-probs lie so far from the engine's, and one without advantage."""
    with_advantage, without = a_rollout([5] * len(gaps)), a_rollout([6])
    batch = a_batch([a_group(with_advantage, without)], [advantage, 0.0])
    batch.old_logprobs = batch.rollout_logprobs + torch.tensor([*gaps, 99.0])
    return batch


def an_update(grad_norm: float) -> Update:
    return Update(0.5, grad_norm, 1e-3, torch.zeros(3, 3), torch.zeros(4, 3))


FINE, SKIPPED = an_update(1.0), an_update(math.nan)


def test_an_engine_that_is_near_enough_on_average_passes() -> None:
    guards(max_logprob_gap=0.25).check_engine(a_step([0.5, 0.0, -0.25]))


@pytest.mark.parametrize("gaps", [[0.5, -0.5], [0.5, 0.25], [math.nan, 0.0], [math.inf, 0.0]])
def test_an_engine_that_is_far_off_ends_the_run(gaps: list[float]) -> None:
    with pytest.raises(DivergedError, match="log-probs of engine and trainer differ by"):
        guards(max_logprob_gap=0.25).check_engine(a_step(gaps))


def test_the_error_says_by_how_much_and_which_limit_that_is() -> None:
    with pytest.raises(DivergedError, match=r"step 1: .* differ by 0\.75 a token .* trainer\.max_logprob_gap is 0\.25"):
        guards(max_logprob_gap=0.25).check_engine(a_step([1.0, -0.5]))


def test_rows_that_were_not_scored_do_not_count() -> None:
    guards(max_logprob_gap=0.25).check_engine(a_step([99.0], advantage=0.0))


def test_skipped_updates_are_logged_and_fewer_than_the_limit_pass(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="retort"):
        guards(max_skipped_updates=3).check_updates([SKIPPED, FINE, SKIPPED, SKIPPED])
    assert [record.getMessage() for record in caplog.records] == ["update_skipped"] * 3


def test_so_many_skipped_in_a_row_end_the_run_over_steps_too() -> None:
    guard = guards(max_skipped_updates=3)
    guard.check_updates([FINE, SKIPPED])
    guard.check_updates([SKIPPED])
    with pytest.raises(DivergedError, match=r"3 updates in a row .*trainer\.max_skipped_updates = 3"):
        guard.check_updates([SKIPPED])


def test_a_good_update_between_starts_the_count_again() -> None:
    guard = guards(max_skipped_updates=2)
    for _ in range(5):
        guard.check_updates([SKIPPED, FINE])


def test_so_many_in_a_row_end_the_run_also_when_a_good_one_follows() -> None:
    with pytest.raises(DivergedError):
        guards(max_skipped_updates=2).check_updates([SKIPPED, SKIPPED, FINE])
