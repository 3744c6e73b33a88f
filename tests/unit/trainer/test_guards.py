import logging
import math

import pytest
import torch

from services.trainer.batch import StepBatch
from services.trainer.guards import DivergedError, Guards, KeptStep, collapse_signals
from services.trainer.update import Update
from tests.training import a_batch, a_config, a_group, a_rollout


def guards(**limits: float) -> Guards:
    return Guards(a_config(trainer=limits).trainer, lambda kept: None)


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


def test_rows_that_an_older_version_sampled_do_not_count() -> None:
    """Step 3 is trained from version 2: what version 1 says of its tokens differs for a good reason."""
    groups = [a_group(a_rollout([5, 6], policy_version=version)) for version in (1, 2)]
    batch = a_batch(groups, [0.5, 0.5], step=3)
    for gaps, is_near in (([9.0, 9.0, 0.0, 0.0], True), ([0.0, 0.0, 9.0, 9.0], False)):
        batch.old_logprobs = batch.rollout_logprobs + torch.tensor(gaps)
        if is_near:
            guards(max_logprob_gap=0.25).check_engine(batch)
        else:
            with pytest.raises(DivergedError, match="differ by 9 a token"):
                guards(max_logprob_gap=0.25).check_engine(batch)


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


def test_a_step_to_which_a_guard_objects_is_kept_whole_with_every_bit() -> None:
    kept: list[KeptStep] = []
    guard = Guards(a_config(trainer={"max_skipped_updates": 3, "max_logprob_gap": 0.25}).trainer, kept.append)
    guard.check_engine(a_step([0.0]))
    guard.check_updates([FINE])
    assert kept == []
    guard.check_engine(a_step([0.125]))  # the second part of the same step
    guard.check_updates([SKIPPED])
    again = KeptStep.from_bytes(kept[0].to_bytes())
    assert (again.step, len(again.groups), again.losses) == (1, 2, [0.5, 0.5])
    assert again.grad_norms[0] == 1.0
    assert math.isnan(again.grad_norms[1])
    with pytest.raises(DivergedError):
        guard.check_engine(a_step([9.0]))
    assert len(kept[1].groups) == 3
    assert "log-probs of engine and trainer differ" in kept[1].why


def test_a_gap_is_told_for_each_replica() -> None:
    batch = a_step([1.0, -0.5])
    with pytest.raises(DivergedError, match=r"\(rollout-0 0\.75\)"):
        guards(max_logprob_gap=0.25).check_engine(batch)


HEALTHY = {"critic/mixed_group_fraction": 0.5, "response_length/clip_ratio": 0.0, "critic/score/mean": 0.4}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"critic/mixed_group_fraction": 0.0}, ["nothing to learn from"]),
        ({"response_length/clip_ratio": 0.75}, ["cut at sampling.max_completion_tokens"]),
        ({"actor/entropy": 0.001}, ["certain and mostly wrong"]),
        ({"actor/entropy": 0.001, "critic/score/mean": 0.9}, []),
    ],
)
def test_a_policy_that_collapses_is_warned_of(changed: dict[str, float], said: list[str]) -> None:
    signals = collapse_signals({**HEALTHY, **changed})
    assert len(signals) == len(said)
    assert all(words in signal for words, signal in zip(said, signals, strict=True))
