import math
from typing import Literal

import pytest
import torch

from services.trainer.rollout_correction import rollout_correction_metrics, rollout_weights

# Two completions of two tokens and an empty one. The ratios old / rollout are 4, 1 and 1/4, 1.
OLD = torch.tensor([0.8, 0.5, 0.1, 0.5], dtype=torch.float64).log()
ROLLOUT = torch.tensor([0.2, 0.5, 0.4, 0.5], dtype=torch.float64).log()
LENGTHS = torch.tensor([2, 0, 2])


def measured(weights: Literal["raw", "applied"] = "raw") -> dict[str, float]:
    return rollout_correction_metrics(
        old_logprobs=OLD, rollout_logprobs=ROLLOUT, lengths=LENGTHS, max_ratio=2.0, weights=weights
    )


def test_large_ratios_are_truncated_and_small_ones_kept() -> None:
    assert rollout_weights(old_logprobs=OLD, rollout_logprobs=ROLLOUT, max_ratio=2.0).tolist() == pytest.approx(
        [2, 1, 0.25, 1]
    )


def test_an_impossible_token_gets_a_weight_that_is_a_number() -> None:
    old, rollout = torch.tensor([-math.inf, -1.0]), torch.tensor([-1.0, -math.inf])
    weights = rollout_weights(old_logprobs=old, rollout_logprobs=rollout, max_ratio=2.0)
    assert weights.tolist() == pytest.approx([math.exp(-20), 2])


def test_raw_statistics_are_of_the_ratio_before_truncation() -> None:
    metrics = measured()
    assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(6.25 / 4)
    assert metrics["rollout_corr/rollout_is_max"] == pytest.approx(4)
    assert metrics["rollout_corr/rollout_is_ratio_fraction_high"] == 0.25
    assert metrics["rollout_corr/rollout_is_ratio_fraction_low"] == 0.25
    # Kept in [1/2, 2]: 2, 1, 0.5, 1 with mean 1.125 and mean square 6.25 / 4.
    assert metrics["rollout_corr/rollout_is_std"] == pytest.approx(math.sqrt(6.25 / 4 - 1.125**2))
    assert metrics["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(1.125**2 / (6.25 / 4))


def test_applied_statistics_are_of_the_weights_in_the_loss() -> None:
    metrics = measured(weights="applied")
    assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(4.25 / 4)
    assert metrics["rollout_corr/rollout_is_max"] == pytest.approx(2)
    assert metrics["rollout_corr/rollout_is_std"] == pytest.approx(math.sqrt(6.0625 / 4 - 1.0625**2))
    # Fractions stay those of the raw ratio: the first completion's mean is 2.5.
    assert metrics["rollout_corr/rollout_is_seq_fraction_high"] == 0.5


def test_sequence_statistics_are_over_completions_that_have_tokens() -> None:
    metrics = measured()
    # Completion means 2.5 and 0.625.
    assert metrics["rollout_corr/rollout_is_seq_mean"] == pytest.approx(1.5625)
    assert metrics["rollout_corr/rollout_is_seq_std"] == pytest.approx(1.875 / math.sqrt(2))
    assert metrics["rollout_corr/rollout_is_seq_max_deviation"] == pytest.approx(1.5)
    # exp(2 sum of log ratios) is 16 and 1/16.
    assert metrics["rollout_corr/chi2_seq"] == pytest.approx((16 + 1 / 16) / 2 - 1)
    # Perplexities of old: 1 / sqrt(0.4), 1 / sqrt(0.05); of rollout 1 / sqrt(0.1), 1 / sqrt(0.2).
    assert metrics["rollout_corr/training_ppl"] == pytest.approx((0.4**-0.5 + 0.05**-0.5) / 2)
    assert metrics["rollout_corr/ppl_ratio"] == pytest.approx((0.5 + 2) / 2)


def test_kl_is_rollout_minus_old() -> None:
    metrics = measured()
    assert metrics["rollout_corr/kl"] == pytest.approx(0, abs=1e-12)
    assert metrics["rollout_corr/k3_kl"] == pytest.approx((3 + 0 - 0.75 + 0) / 4)
    assert metrics["rollout_corr/chi2_token"] == pytest.approx((16 + 1 + 1 / 16 + 1) / 4 - 1)


def test_probability_gaps_are_absolute_differences_of_probabilities() -> None:
    metrics = measured()
    assert metrics["training/rollout_probs_diff_mean"] == pytest.approx((0.6 + 0 + 0.3 + 0) / 4)
    assert metrics["training/rollout_probs_diff_max"] == pytest.approx(0.6)
    # Deviations from means 0.475 and 0.4.
    a, b = [0.325, 0.025, -0.375, 0.025], [-0.2, 0.1, 0.0, 0.1]
    products, norms = sum(x * y for x, y in zip(a, b, strict=True)), math.hypot(*a) * math.hypot(*b)
    assert metrics["training/rollout_actor_probs_pearson_corr"] == pytest.approx(products / norms)


def test_one_token_is_enough_and_everything_is_a_number() -> None:
    one = torch.tensor([-1.0])
    metrics = rollout_correction_metrics(
        old_logprobs=one, rollout_logprobs=one, lengths=torch.tensor([1]), max_ratio=2.0
    )
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["rollout_corr/rollout_is_mean"] == 1.0
