"""The loss of one optimizer update: RLSD token weights, clipped surrogate, aggregation.

Tensors are packed: the N completion tokens of a micro-batch lie one after the other, without padding, and R
completions share them. A token knows its completion by `rows` [N]; a per-completion tensor [R] becomes one
per token by `[rows]`. Everything but `trainer_logprobs` is a constant: the only way of the gradient is the
ratio. Tensors go by keyword, because one taken for another of the same shape would train without a word.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from services.trainer.moments import moments, std

MAX_LOG_RATIO = 20.0
"""Log ratios are kept in [-20, 20] before exp(), here and in the rollout correction."""

Aggregation = Literal["sequence_mean", "token_mean", "horizon"]


class TokenWeights(NamedTuple):
    """What the teacher says about N tokens. Where there is no demonstration, all three are 1."""

    evidence: Tensor
    """w [N], the evidence ratio."""
    clipped: Tensor
    """c [N], w kept in the band."""
    factor: Tensor
    """m [N], the factor on the advantage. Positive, so the sign of the advantage stays."""
    statistics: Tensor
    """[4, 3] moments of: has a demonstration, w, c, w was outside the band. See `weight_metrics`."""


class PolicyLoss(NamedTuple):
    loss: Tensor
    """[] this micro-batch's share of the update's loss; the shares of all micro-batches and ranks add up."""
    token_losses: Tensor
    """[N] the clipped loss of each token times its rollout weight, detached."""
    statistics: Tensor
    """[3, 3] moments of: clipped, capped by the dual clip, old - trainer logprob. See `loss_metrics`."""


@torch.no_grad()
def rlsd_weights(
    *,
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    advantages: Tensor,
    has_demonstration: Tensor,
    reweight_lambda: float,
    reweight_clip: float,
) -> TokenWeights:
    """RLSD's factor on the advantage of each token. All inputs are [N], one value per token.

        student_logprobs   of the policy being trained (or, as a variant, the old logprobs)
        teacher_logprobs   of the teacher that saw the demonstration; any value, even NaN, where it saw none
        advantages         of the token's completion
        has_demonstration  bool

        w = exp(clamp(sign(A) (teacher - student), -20, 20))    c = clip(w, max(0, 1 - eps), 1 + eps)
        m = (1 - lambda) + lambda c,  eps = reweight_clip

    A = 0 has no direction: w = 1, also where the teacher rules the token out (-inf). Source: RLSD (code of
    iie-ycx/RLSD), in the form of the reference run (jungseongryong/L2T).
    """
    direction = advantages.sign()
    log_evidence = direction * (teacher_logprobs - student_logprobs)
    informed = has_demonstration & (direction != 0)
    # where(), not a product with 0: NaN and inf of tokens that carry no evidence must not get through.
    evidence = torch.where(informed, log_evidence.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), 1.0)
    low, high = max(0.0, 1 - reweight_clip), 1 + reweight_clip
    clipped = evidence.clamp(low, high)
    # lerp is exact where it matters: 1 at c = 1 or lambda = 0 (plain GRPO, bit for bit), c at lambda = 1.
    factor = torch.where(has_demonstration, torch.lerp(torch.ones_like(clipped), clipped, reweight_lambda), 1.0)
    outside = ((evidence < low) | (evidence > high))[has_demonstration]
    statistics = (has_demonstration, evidence[has_demonstration], clipped[has_demonstration], outside)
    return TokenWeights(evidence, clipped, factor, torch.stack([moments(values) for values in statistics]))


def policy_loss(
    *,
    trainer_logprobs: Tensor,
    old_logprobs: Tensor,
    token_advantages: Tensor,
    rollout_weights: Tensor,
    loss_weights: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> PolicyLoss:
    """Clipped surrogate of one micro-batch; the losses of all micro-batches and ranks add up to the update's.

    All inputs are [N], one value per token:

        trainer_logprobs   of the policy being trained; carries the gradient
        old_logprobs       of the policy at the start of the step
        token_advantages   A' = A m
        rollout_weights    u, from `rollout_correction.rollout_weights`; 1 turns the correction off
        loss_weights       from `aggregation_weights`, of the token's completion

        r = exp(clamp(trainer - old, -20, 20))
        l = max(-A' r, -A' clip(r, 1 - clip_low, 1 + clip_high)), at most -dual_clip A' where A' < 0
        loss = sum of loss_weights u l

    The correction multiplies after clipping. `dual_clip` = inf turns the cap off. Sources: PPO arXiv
    1707.06347, dual clip arXiv 1912.09729, clip-higher arXiv 2503.14476.
    """
    log_ratio = (trainer_logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -token_advantages * ratio
    clipped = -token_advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    pessimistic = torch.maximum(unclipped, clipped)
    cap = -token_advantages * dual_clip
    capped = (token_advantages < 0) & (pessimistic > cap)
    token_losses = rollout_weights * torch.where(capped, cap, pessimistic)
    statistics = torch.stack([moments(values) for values in (clipped > unclipped, capped, -log_ratio)])
    return PolicyLoss((loss_weights * token_losses).sum(), token_losses.detach(), statistics)


def aggregation_weights(
    aggregation: Aggregation, lengths: Tensor, *, num_sequences: int, num_tokens: int, horizon: int
) -> Tensor:
    """Weight in the loss of every token of a completion: [R] from `lengths` [R], in float64.

        sequence_mean  1 / (num_sequences T)        mean over completions of token means; reference run
        token_mean     1 / num_tokens               every token of the update counts the same (DAPO)
        horizon        1 / (num_sequences horizon)  mean over completions of sum / horizon (Dr. GRPO)

    `num_sequences` and `num_tokens` count the whole update, over all micro-batches and ranks: empty
    completions and those with advantage 0 included. Sources: verl's loss_agg_mode, DAPO arXiv 2503.14476,
    Dr. GRPO arXiv 2503.20783.
    """
    lengths = lengths.double()
    if aggregation == "sequence_mean":
        return 1 / (num_sequences * lengths.clamp(min=1))
    divisor = max(1, num_tokens) if aggregation == "token_mean" else num_sequences * horizon
    return torch.full_like(lengths, 1 / divisor)


def loss_metrics(statistics: Tensor) -> dict[str, float]:
    """Reference metrics from `PolicyLoss.statistics`, merged over what they shall cover."""
    clipped, capped, kl = statistics[:, 1].tolist()
    return {"actor/pg_clipfrac": clipped, "actor/pg_clipfrac_lower": capped, "actor/ppo_kl": kl}


def weight_metrics(statistics: Tensor) -> dict[str, float]:
    """Reference metrics from `TokenWeights.statistics`, merged. With no demonstration every weight is 1."""
    active, evidence, clipped, outside = statistics[:, 1].tolist()
    any_active = bool(statistics[1, 0] > 0)
    return {
        "self_distillation/token_reweight_active_token_fraction": active,
        "self_distillation/token_reweight_w_mean": evidence if any_active else 1.0,
        "self_distillation/token_reweight_w_std": float(std(statistics[1])),
        "self_distillation/token_reweight_w_clipped_mean": clipped if any_active else 1.0,
        "self_distillation/token_reweight_w_clip_frac": outside,
    }
