import math
from collections.abc import Sequence

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from retort.config import MethodConfig
from services.trainer.batch import StepBatch
from services.trainer.loss import loss_metrics, weight_metrics
from services.trainer.packing import MicroBatch
from services.trainer.policy import Policy
from services.trainer.policy_model import TokenScores
from services.trainer.update import update_policy
from tests.training import a_batch, a_config, a_group, a_language_model, a_rollout

COMPLETIONS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
RLSD = MethodConfig()


class RecordingPolicy(Policy):
    """Remembers which rows passed through the network."""

    passed: list[int]

    def differentiable_scores(self, micro_batch: MicroBatch, *, entropies: bool) -> TokenScores:
        self.passed = [*getattr(self, "passed", []), *micro_batch.rows]
        return super().differentiable_scores(micro_batch, entropies=entropies)


def a_policy(mesh: DeviceMesh, max_grad_norm: float = 1e9) -> RecordingPolicy:
    settings = a_config(trainer={"max_grad_norm": max_grad_norm, "weight_decay": 0.1}).trainer
    return RecordingPolicy(a_language_model(), settings, mesh, dtype=torch.float64, temperature=1.0)


def a_step(policy: Policy, advantages: Sequence[float], *, taught: bool = False) -> StepBatch:
    """A step whose old log-probs are the policy's own and whose engine agreed, so that every ratio is 1."""
    rollouts = [a_rollout(ids) for ids in COMPLETIONS[: len(advantages)]]
    teacher_prompts = [[1] if taught else None] * len(advantages)
    batch = a_batch([a_group(*rollouts, prompt_ids=[1, 2])], advantages, teacher_prompts)
    every_row = range(len(advantages))
    batch.old_logprobs, batch.entropies = policy.score(batch, every_row, batch.prompts)
    batch.rollout_logprobs = batch.teacher_logprobs = batch.old_logprobs
    return batch


def first_moments(policy: Policy) -> list[torch.Tensor]:
    return [policy.optimizer.state[parameter]["exp_avg"].clone() for parameter in policy.parameters()]


def weights(policy: Policy) -> list[torch.Tensor]:
    return [shard.clone() for shard in policy.local_shards()]


def test_at_ratio_1_the_loss_is_minus_the_mean_advantage_over_all_rows_of_the_update(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    batch = a_step(policy, [0.75, -0.25, 0.0, 0.5])
    assert update_policy(policy, batch, [0, 1, 2], RLSD, learning_rate=0.0).loss == pytest.approx(-0.5 / 3)
    assert update_policy(policy, batch, [3, 2], RLSD, learning_rate=0.0).loss == pytest.approx(-0.5 / 2)


def test_rows_without_advantage_never_pass_through_the_network(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    update_policy(policy, a_step(policy, [0.0, 0.5, 0.0, -0.5]), [0, 1, 2, 3], RLSD, learning_rate=0.0)
    assert sorted(policy.passed) == [1, 3]


def test_a_row_of_vanishing_advantage_gives_the_gradient_of_a_row_left_out(mesh: DeviceMesh) -> None:
    left_out, passed = a_policy(mesh), a_policy(mesh)
    update_policy(left_out, a_step(left_out, [0.5, 0.0, -0.25]), [0, 1, 2], RLSD, learning_rate=0.0)
    update_policy(passed, a_step(passed, [0.5, 1e-300, -0.25]), [0, 1, 2], RLSD, learning_rate=0.0)
    assert (sorted(left_out.passed), sorted(passed.passed)) == ([0, 2], [0, 1, 2])
    for ours, theirs in zip(first_moments(left_out), first_moments(passed), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_an_update_without_any_advantage_still_decays_moments_and_weights(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    update_policy(policy, a_step(policy, [0.5, -0.5]), [0, 1], RLSD, learning_rate=0.0)
    moments, before = first_moments(policy), weights(policy)
    update = update_policy(policy, a_step(policy, [0.0, 0.0]), [0, 1], RLSD, learning_rate=1e-3)
    assert (update.loss, update.grad_norm, update.is_finite) == (0.0, 0.0, True)
    for now, moment in zip(first_moments(policy), moments, strict=True):
        torch.testing.assert_close(now, 0.9 * moment, rtol=1e-12, atol=0)
    assert all(not torch.equal(*pair) for pair in zip(weights(policy), before, strict=True))


def test_rows_that_no_pass_sees_count_in_the_shares_of_tokens(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    batch = a_step(policy, [0.5, 0.0, -0.5, 0.0], taught=True)
    batch.teacher_logprobs = batch.old_logprobs - 1.0
    batch.old_logprobs = batch.old_logprobs - 1.0
    update = update_policy(policy, batch, [0, 1, 2, 3], RLSD, learning_rate=0.0)
    # Rows of 3, 1, 2 and 4 tokens, the second and last idle. Ratio e: of the first row's tokens all are clipped.
    assert loss_metrics(update.loss_statistics) == pytest.approx(
        {"actor/pg_clipfrac": 3 / 10, "actor/pg_clipfrac_lower": 0.0, "actor/ppo_kl": -1.0}
    )
    # The teacher finds every token e times less likely: w = 1/e where A > 0, e where A < 0, 1 where it is idle.
    metrics = weight_metrics(update.weight_statistics)
    metrics = {name.removeprefix("self_distillation/token_reweight_"): value for name, value in metrics.items()}
    assert metrics["active_token_fraction"] == 1.0
    assert metrics["w_mean"] == pytest.approx((3 / math.e + 2 * math.e + 5) / 10)
    assert metrics["w_clipped_mean"] == pytest.approx((3 * 0.8 + 2 * 1.2 + 5) / 10)
    assert metrics["w_clip_frac"] == pytest.approx(5 / 10)


def test_a_fresh_optimizer_without_any_advantage_decays_the_weights_alone(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    before = weights(policy)
    update_policy(policy, a_step(policy, [0.0, 0.0]), [0, 1], RLSD, learning_rate=0.5)
    for now, old in zip(weights(policy), before, strict=True):
        torch.testing.assert_close(now, old * (1 - 0.5 * 0.1), rtol=1e-12, atol=0)


def test_a_gradient_that_is_not_a_number_skips_the_update(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    batch = a_step(policy, [0.5, -0.5], taught=True)
    batch.teacher_logprobs = torch.full_like(batch.old_logprobs, math.nan)
    before = weights(policy)
    update = update_policy(policy, batch, [0, 1], RLSD, learning_rate=1.0)
    assert not update.is_finite
    assert all(torch.equal(*pair) for pair in zip(weights(policy), before, strict=True))
    assert not policy.optimizer.state


def test_a_loss_that_is_not_a_number_skips_the_update_though_its_gradient_is(mesh: DeviceMesh) -> None:
    """Behind the clamp of the ratio the gradient of a NaN is 0, which would pass for a good one."""
    policy = a_policy(mesh)
    batch = a_step(policy, [0.5, -0.5])
    batch.old_logprobs = torch.full_like(batch.old_logprobs, math.nan)
    before = weights(policy)
    update = update_policy(policy, batch, [0, 1], RLSD, learning_rate=1.0)
    assert (math.isnan(update.loss), update.is_finite) == (True, False)
    assert all(torch.equal(*pair) for pair in zip(weights(policy), before, strict=True))


def test_the_teacher_moves_the_weight_of_a_token_within_its_band(mesh: DeviceMesh) -> None:
    """The teacher finds the tokens of both rows far likelier: credit grows by a tenth, blame shrinks by a tenth."""
    policy = a_policy(mesh)
    batch = a_step(policy, [0.5, -0.5, 0.5], taught=True)
    batch.teacher_logprobs = batch.old_logprobs + 5.0
    update = update_policy(policy, batch, [0, 1], RLSD, learning_rate=0.0)
    assert update.loss == pytest.approx(-(0.5 * 1.1 - 0.5 * 0.9) / 2)
    assert batch.split(batch.token_weights) == [pytest.approx([1.1] * 3), pytest.approx([0.9]), [0.0, 0.0]]
    metrics = weight_metrics(update.weight_statistics)
    assert metrics["self_distillation/token_reweight_w_clip_frac"] == 1.0
    assert metrics["self_distillation/token_reweight_w_clipped_mean"] == pytest.approx((3 * 1.2 + 0.8) / 4)


def test_the_engines_disagreement_weighs_at_most_two(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    batch = a_step(policy, [0.5])
    batch.rollout_logprobs = batch.old_logprobs - 3.0
    assert update_policy(policy, batch, [0], RLSD, learning_rate=0.0).loss == pytest.approx(-0.5 * 2.0)


def test_statistics_cover_all_tokens_of_the_update(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    batch = a_step(policy, [0.5, -0.5])
    batch.old_logprobs = batch.old_logprobs + torch.tensor([-1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    batch.rollout_logprobs = batch.old_logprobs
    update = update_policy(policy, batch, [0, 1], RLSD, learning_rate=0.25)
    assert update.learning_rate == 0.25
    metrics = loss_metrics(update.loss_statistics)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(1 / 4)
    assert metrics["actor/ppo_kl"] == pytest.approx(-1 / 4)
