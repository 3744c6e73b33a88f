"""The gap between the engine that sampled and the trainer that learns: its correction and its measures."""

from typing import Literal

import torch
from torch import Tensor

from services.trainer.loss import MAX_LOG_RATIO


@torch.no_grad()
def rollout_weights(*, old_logprobs: Tensor, rollout_logprobs: Tensor, max_ratio: float) -> Tensor:
    """Truncated importance weight u = min(exp(clamp(old - rollout, -20, 20)), max_ratio) of each token, [N].

    A clamp, not a mask: nothing is rejected, and small ratios keep their value. Source: verl's rollout
    correction at token level (TIS).
    """
    return _ratio(old_logprobs - rollout_logprobs).clamp(max=max_ratio)


@torch.no_grad()
def rollout_correction_metrics(
    *,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    lengths: Tensor,
    max_ratio: float,
    weights: Literal["raw", "applied"] = "raw",
) -> dict[str, float]:
    """`rollout_corr/*` and `training/rollout_*` of a step.

    The logprobs [N] of all its completion tokens lie packed, completion after completion, `lengths` [R] tokens
    each; empty completions do not count, and at least one is not empty. `weights` says whose statistics
    `rollout_is_*` are: of the ratio before truncation, as in the reference run, or of the weights that multiply
    the loss, as in verl since. Fractions above `max_ratio` and below its inverse are always of the raw ratio.
    Source: verl's rollout correction.
    """
    old, rollout = old_logprobs.double(), rollout_logprobs.double()
    lengths = lengths[lengths > 0]
    weight_metrics = _weight_metrics(old - rollout, lengths, max_ratio, weights)
    gap_metrics = _gap_metrics(old, rollout, lengths)
    return {
        **{f"rollout_corr/{name}": value.item() for name, value in (weight_metrics | gap_metrics).items()},
        **{f"training/{name}": value.item() for name, value in _probability_metrics(old, rollout).items()},
    }


def _weight_metrics(
    log_ratio: Tensor, lengths: Tensor, max_ratio: float, weights: Literal["raw", "applied"]
) -> dict[str, Tensor]:
    raw = _ratio(log_ratio)
    low, high = 1 / max_ratio, max_ratio
    reported = raw if weights == "raw" else raw.clamp(max=high)
    # The reference run's deviation and effective sample size are of the ratio kept in [low, high].
    stable = raw.clamp(low, high) if weights == "raw" else reported
    raw_means, means = _sequence_sums(raw, lengths) / lengths, _sequence_sums(reported, lengths) / lengths
    return {
        "rollout_is_mean": reported.mean(),
        "rollout_is_max": reported.max(),
        "rollout_is_min": reported.min(),
        "rollout_is_std": stable.std(correction=0),
        "rollout_is_eff_sample_size": stable.mean().square() / stable.square().mean(),
        "rollout_is_ratio_fraction_high": (raw > high).double().mean(),
        "rollout_is_ratio_fraction_low": (raw < low).double().mean(),
        "rollout_is_seq_mean": means.mean(),
        "rollout_is_seq_std": _sample_std(means),
        "rollout_is_seq_max": means.max(),
        "rollout_is_seq_min": means.min(),
        "rollout_is_seq_max_deviation": (means - 1).abs().max(),
        "rollout_is_seq_fraction_high": (raw_means > high).double().mean(),
        "rollout_is_seq_fraction_low": (raw_means < low).double().mean(),
    }


def _gap_metrics(old: Tensor, rollout: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    log_ratio = old - rollout
    old_means, rollout_means = _sequence_sums(old, lengths) / lengths, _sequence_sums(rollout, lengths) / lengths
    difference = rollout_means - old_means
    return {
        "kl": -log_ratio.mean(),
        "k3_kl": (log_ratio.expm1() - log_ratio).mean(),
        "training_ppl": (-old_means).exp().mean(),
        "training_log_ppl": -old_means.mean(),
        "rollout_ppl": (-rollout_means).exp().mean(),
        "rollout_log_ppl": -rollout_means.mean(),
        "log_ppl_diff": difference.mean(),
        "log_ppl_abs_diff": difference.abs().mean(),
        "log_ppl_diff_max": difference.max(),
        "log_ppl_diff_min": difference.min(),
        "ppl_ratio": difference.exp().mean(),
        "chi2_token": _ratio(log_ratio).square().mean() - 1,
        "chi2_seq": _ratio(_sequence_sums(log_ratio, lengths)).square().mean() - 1,
    }


def _probability_metrics(old: Tensor, rollout: Tensor) -> dict[str, Tensor]:
    old_probs, rollout_probs = old.exp(), rollout.exp()
    gap = (old_probs - rollout_probs).abs()
    a, b = old_probs - old_probs.mean(), rollout_probs - rollout_probs.mean()
    # The correlation of a constant is not defined; 0 says that nothing was seen to vary together.
    correlation = (a @ b / (a.norm() * b.norm())).nan_to_num(nan=0.0)
    return {
        "rollout_probs_diff_mean": gap.mean(),
        "rollout_probs_diff_max": gap.max(),
        "rollout_probs_diff_std": _sample_std(gap),
        "rollout_actor_probs_pearson_corr": correlation,
    }


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _sequence_sums(values: Tensor, lengths: Tensor) -> Tensor:
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    return values.new_zeros(len(lengths)).index_add(0, rows, values)


def _sample_std(values: Tensor) -> Tensor:
    """Deviation with n - 1; 0 for a single value."""
    return values.std() if values.numel() > 1 else values.new_zeros(())
