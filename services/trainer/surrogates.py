"""Surrogates beside PPO's (`loss.policy_loss`, whose arguments these share)."""

import torch
from torch import Tensor

from retort.config import MethodConfig
from services.trainer.loss import MAX_LOG_RATIO, PolicyLoss
from services.trainer.moments import moments


def gspo_loss(
    *,
    trainer_logprobs: Tensor,
    old_logprobs: Tensor,
    token_advantages: Tensor,
    rollout_weights: Tensor,
    loss_weights: Tensor,
    rows: Tensor,
    config: MethodConfig,
) -> PolicyLoss:
    """One ratio for all tokens of a completion, their geometric mean, clipped as in PPO (GSPO, arXiv 2507.18071).

        s = exp(mean over the completion's tokens of (trainer - old))
        l = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))

    s moves far less than a token's ratio: the paper clips at 3e-4 and 4e-4. All inputs [N]; `rows` [N] numbers the
    completion of each token, and a completion is never split over micro-batches.
    """
    log_ratio = (trainer_logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    completions, row = rows.unique(return_inverse=True)
    sums = log_ratio.new_zeros(len(completions)).index_add(0, row, log_ratio)
    ratio = (sums / torch.bincount(row, minlength=len(completions)))[row].exp()
    unclipped = -token_advantages * ratio
    clipped = -token_advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    token_losses = rollout_weights * torch.maximum(unclipped, clipped)
    statistics = torch.stack([moments(clipped > unclipped), moments(torch.zeros_like(ratio)), moments(-log_ratio)])
    return PolicyLoss((loss_weights * token_losses).sum(), token_losses.detach(), statistics)


def cispo_loss(
    *,
    trainer_logprobs: Tensor,
    old_logprobs: Tensor,
    token_advantages: Tensor,
    rollout_weights: Tensor,
    loss_weights: Tensor,
    rows: Tensor,
    config: MethodConfig,
) -> PolicyLoss:
    """The clipped ratio as a constant weight on the log-prob, so that no token loses its gradient (arXiv 2506.13585).

    l = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi
    """
    assert rows.shape == trainer_logprobs.shape
    log_ratio = (trainer_logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).detach()
    ratio = log_ratio.exp()
    weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    token_losses = -rollout_weights * weight * token_advantages * trainer_logprobs
    statistics = torch.stack([moments(weight != ratio), moments(torch.zeros_like(ratio)), moments(-log_ratio)])
    return PolicyLoss((loss_weights * token_losses).sum(), token_losses.detach(), statistics)
