"""The metrics of a step and of a validation, under the reference run's names (docs/algorithm.md explains each)."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean

import torch

from retort.questions import Question
from retort.rollouts import RolloutGroup
from services.trainer.advantage import demonstration_metrics
from services.trainer.batch import StepBatch
from services.trainer.loss import loss_metrics, weight_metrics
from services.trainer.moments import merge
from services.trainer.rollout_correction import rollout_correction_metrics
from services.trainer.update import Update
from services.trainer.validation_metrics import validation_metrics


def step_metrics(
    batch: StepBatch, updates: Sequence[Update], max_completion_tokens: int, max_rollout_ratio: float
) -> dict[str, float]:
    """Everything about a step but its times."""
    members = [index for index, group in enumerate(batch.groups) for _ in group.rollouts]
    shown = [row if has else None for row, has in enumerate(batch.has_demonstration.tolist())]
    learned = [update for update in updates if update.is_finite]
    return {
        **_rewards(batch),
        **_lengths(batch, max_completion_tokens),
        **demonstration_metrics(batch.rewards, members, shown),
        **loss_metrics(merge(torch.stack([update.loss_statistics for update in updates]))),
        **weight_metrics(merge(torch.stack([update.weight_statistics for update in updates]))),
        **_engine(batch, max_rollout_ratio),
        "actor/pg_loss": mean(update.loss for update in learned) if learned else 0.0,
        "actor/grad_norm": mean(update.grad_norm for update in learned) if learned else 0.0,
        "actor/lr": updates[0].learning_rate,
        "actor/updates_skipped": len(updates) - len(learned),
        "staleness/max": batch.step - 1 - min(group.oldest_policy_version for group in batch.groups),
        "perf/total_num_tokens": sum(map(len, batch.prompts)) + int(batch.lengths.sum()),
    }


def validation_metrics_of(groups: Sequence[tuple[RolloutGroup, Question]]) -> dict[str, float]:
    """val-core/* and val-aux/*, for every data source by itself."""
    by_source: dict[str, list[RolloutGroup]] = defaultdict(list)
    for group, question in groups:
        by_source[question.data_source].append(group)
    metrics: dict[str, float] = {}
    for source, members in by_source.items():
        scores = [[rollout.reward for rollout in group.rollouts] for group in members]
        predictions = [[rollout.parsed for rollout in group.rollouts] for group in members]
        metrics |= validation_metrics(source, scores, predictions)
    return metrics


def _rewards(batch: StepBatch) -> dict[str, float]:
    rewards = batch.rewards
    values = {"mean": mean(rewards), "max": max(rewards), "min": min(rewards)}
    mixed = sum(len({rollout.reward for rollout in group.rollouts}) > 1 for group in batch.groups)
    return {
        **{f"critic/score/{name}": value for name, value in values.items()},
        **{f"critic/rewards/{name}": value for name, value in values.items()},
        "critic/mixed_group_fraction": mixed / len(batch.groups),
        "critic/format_fraction": mean(rollout.format_ok for rollout in batch.rollouts),
    }


def _lengths(batch: StepBatch, max_completion_tokens: int) -> dict[str, float]:
    lengths = batch.lengths.double()
    return {
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "response_length/min": float(lengths.min()),
        "response_length/clip_ratio": float((lengths >= max_completion_tokens).double().mean()),
        "prompt_length/mean": mean(map(len, batch.prompts)),
    }


def _engine(batch: StepBatch, max_rollout_ratio: float) -> dict[str, float]:
    """Engine against trainer, over the rows that have old logprobs."""
    rows = [row for row in batch.scored_rows if batch.lengths[row]]
    if not rows:
        return {}
    tokens = batch.tokens_of(rows)
    return {
        **rollout_correction_metrics(
            old_logprobs=batch.old_logprobs[tokens],
            rollout_logprobs=batch.rollout_logprobs[tokens],
            lengths=batch.lengths[rows],
            max_ratio=max_rollout_ratio,
        ),
        "actor/entropy": float(batch.entropies[tokens].mean()),
    }
