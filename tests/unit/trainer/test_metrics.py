import math

import pytest
import torch

from retort.rollouts import RolloutGroup
from services.trainer.batch import StepBatch
from services.trainer.metrics import step_metrics, validation_metrics_of
from services.trainer.moments import moments
from services.trainer.update import Update
from tests.training import a_batch, a_group, a_question, a_rollout

NOTHING = torch.zeros(1)[:0]


def an_update(loss: float = 0.0, grad_norm: float = 1.0, clipped: list[float] | None = None) -> Update:
    of_clipping = moments(torch.tensor(clipped or []))
    loss_statistics = torch.stack([of_clipping, moments(NOTHING), moments(NOTHING)])
    return Update(loss, grad_norm, 1e-3, loss_statistics, torch.stack([moments(NOTHING)] * 4))


def a_step() -> StepBatch:
    """Two groups; the second has no advantage. Four completions of 2, 8, 1 and 1 tokens behind 3-token prompts."""
    mixed = a_group(a_rollout([5] * 2, reward=1.0, policy_version=4), a_rollout([5] * 8, reward=0.0, policy_version=3))
    right = a_group(a_rollout([6], reward=1.0, policy_version=4), a_rollout([6], reward=1.0, policy_version=4))
    batch = a_batch([mixed, right], [0.5, -0.5, 0.0, 0.0], [None, [1], None, None], step=5)
    batch.old_logprobs = batch.rollout_logprobs.clone()
    batch.entropies = torch.tensor([1.0] * 5 + [3.0] * 5 + [99.0] * 2)
    return batch


def metrics_of(*updates: Update) -> dict[str, float]:
    return step_metrics(a_step(), updates or [an_update()], 8, 2.0)


def test_scores_and_rewards_are_the_same_numbers() -> None:
    metrics = metrics_of()
    for name in ("critic/score", "critic/rewards"):
        assert (metrics[f"{name}/mean"], metrics[f"{name}/max"], metrics[f"{name}/min"]) == (0.75, 1.0, 0.0)
    assert metrics["critic/mixed_group_fraction"] == 0.5
    assert metrics["critic/format_fraction"] == 1.0


def test_lengths_and_the_share_that_was_cut() -> None:
    metrics = metrics_of()
    names = ("mean", "max", "min", "clip_ratio")
    assert [metrics[f"response_length/{name}"] for name in names] == [3.0, 8.0, 1.0, 0.25]
    assert metrics["prompt_length/mean"] == 3.0
    assert metrics["perf/total_num_tokens"] == 4 * 3 + 12


def test_staleness_is_that_of_the_oldest_token() -> None:
    assert metrics_of()["staleness/max"] == 1


def test_entropy_covers_the_rows_that_were_scored() -> None:
    assert metrics_of()["actor/entropy"] == pytest.approx(2.0)


def test_with_idle_rows_scored_entropy_covers_every_token() -> None:
    batch = a_step()
    batch.scores_idle_rows = True
    assert step_metrics(batch, [an_update()], 8, 2.0)["actor/entropy"] == pytest.approx((5 * 1 + 5 * 3 + 2 * 99) / 12)


def test_an_engine_that_agrees_has_ratio_1() -> None:
    metrics = metrics_of()
    assert metrics["rollout_corr/rollout_is_mean"] == 1.0
    assert metrics["training/rollout_probs_diff_max"] == 0.0


def test_updates_are_averaged_and_skipped_ones_count_apart() -> None:
    metrics = metrics_of(an_update(0.5, 2.0), an_update(0.25, math.nan), an_update(0.0, 4.0))
    assert metrics["actor/pg_loss"] == 0.25
    assert metrics["actor/grad_norm"] == 3.0
    assert metrics["actor/updates_skipped"] == 1
    assert metrics["actor/lr"] == 1e-3


def test_fractions_of_tokens_weigh_every_token_alike() -> None:
    metrics = metrics_of(an_update(clipped=[1.0]), an_update(clipped=[0.0, 0.0, 0.0]))
    assert metrics["actor/pg_clipfrac"] == 0.25


def test_demonstrations_are_counted() -> None:
    metrics = metrics_of()
    assert metrics["self_distillation/success_sample_fraction"] == 0.25
    assert metrics["self_distillation/success_group_fraction"] == 1.0


def test_a_step_in_which_all_is_skipped_has_norm_0() -> None:
    assert metrics_of(an_update(grad_norm=math.inf))["actor/grad_norm"] == 0.0


def test_a_step_without_any_advantage_says_nothing_of_the_engine() -> None:
    batch = a_batch([a_group(a_rollout([5]), a_rollout([5]))], [0.0, 0.0])
    metrics = step_metrics(batch, [an_update()], 8, 2.0)
    assert "actor/entropy" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())


def test_validation_counts_every_data_source_by_itself() -> None:
    def group(*rewards: float) -> RolloutGroup:
        return a_group(*(a_rollout(reward=reward, parsed="AB"[int(reward)]) for reward in rewards), kind="validation")

    metrics = validation_metrics_of(
        [
            (group(1.0, 0.0), a_question(0, data_source="acids")),
            (group(1.0, 1.0), a_question(1, data_source="acids")),
            (group(0.0, 0.0), a_question(2, data_source="bases")),
        ]
    )
    assert metrics["val-core/acids/acc/mean@2"] == 0.75
    assert metrics["val-core/bases/acc/mean@2"] == 0.0
    assert 0.75 < metrics["val-core/acids/acc/best@2/mean"] <= 1.0
