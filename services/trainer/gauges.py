"""What the trainer tells Prometheus: where it stands, and the last line of metrics.jsonl under names with units."""

from collections.abc import Mapping
from types import MappingProxyType

from prometheus_client import Counter, Gauge

VALIDATION_PREFIX = "val-core/"

PROGRESS = Gauge("trainer_progress_timestamp_seconds", "When the trainer last said what it is doing (Unix time).")
POLICY_VERSION = Gauge("trainer_policy_version", "Policy version that the last training step made.")
EVICTIONS = Counter("trainer_evictions", "Rollout replicas evicted during a weight sync.", ["phase"])
VALIDATION_SCORE = Gauge(
    "trainer_validation_score_ratio",
    "Mean score of the last validation; `statistic` is mean@n, maj@n/mean or best@n/mean.",
    ["data_source", "statistic"],
)


def _of_step(name: str, meaning: str) -> Gauge:
    return Gauge(f"trainer_{name}", f"{meaning} Last training step.")


STEP_GAUGES: Mapping[str, Gauge] = MappingProxyType(
    {
        "critic/score/mean": _of_step("reward_mean", "Mean reward of the completions."),
        "critic/mixed_group_fraction": _of_step("mixed_group_ratio", "Groups with right and wrong completions."),
        "critic/format_fraction": _of_step("format_ratio", "Completions in the format that was asked for."),
        "response_length/mean": _of_step("completion_length_tokens", "Mean length of a completion."),
        "response_length/clip_ratio": _of_step("completion_cut_ratio", "Completions cut at the longest length."),
        "actor/entropy": _of_step("entropy_nats", "Mean entropy of the policy a token."),
        "actor/grad_norm": _of_step("gradient_norm", "Mean norm of the gradient before clipping."),
        "actor/pg_clipfrac": _of_step("clipped_ratio", "Tokens whose ratio was clipped."),
        "actor/lr": _of_step("learning_rate", "Learning rate."),
        "actor/updates_skipped": _of_step("skipped_updates", "Updates skipped for a gradient that was not finite."),
        "training/rollout_probs_diff_mean": _of_step(
            "engine_gap_ratio", "Mean difference of a token's probability between engine and trainer."
        ),
        "rollout_corr/kl": _of_step("engine_kl_nats", "Mean logprob of the engine minus the trainer's, a token."),
        "staleness/max": _of_step("staleness_versions", "Largest distance of a group's policy from the trainer's."),
        "self_distillation/reprompt_sample_fraction": _of_step(
            "demonstration_ratio", "Completions whose teacher was shown a demonstration."
        ),
        "weight_sync/replicas": _of_step("synced_replicas", "Rollout replicas that took the new version."),
        "weight_sync/probe_gap": _of_step(
            "probe_gap_nats", "Largest difference of a log-probability of the probe prompt between replica and trainer."
        ),
        "weight_sync/seconds": _of_step(
            "sync_seconds",
            "Bringing a version to every replica; with max_staleness above 0, and so beside training, the one before.",
        ),
        "perf/throughput": _of_step("throughput_tokens_per_second", "Tokens trained on, per second of the step."),
        "perf/mfu": _of_step("mfu_ratio", "Operations computed over what the devices could have done."),
        "perf/packing_efficiency": _of_step("packing_ratio", "Tokens of micro-batches over what they had room for."),
        "perf/max_memory_allocated_gb": _of_step("peak_memory_gigabytes", "The most memory that a rank had."),
        "timing_s/step": _of_step("step_seconds", "The whole step."),
        "timing_s/wait_groups": _of_step("wait_groups_seconds", "Waiting for rollouts."),
        "timing_s/wait_redis": _of_step("wait_redis_seconds", "Waiting for Redis, at its memory limit, to take work."),
        "timing_s/wait_replica": _of_step("wait_replica_seconds", "Waiting for a rollout replica."),
        "timing_s/old_logprobs": _of_step(
            "old_logprobs_seconds", "Computing log-probs of the policy before the step, but for the first update's."
        ),
        "timing_s/teacher": _of_step("teacher_seconds", "Computing the teacher's log-probs."),
        "timing_s/update": _of_step("update_seconds", "The updates: forward, backward, optimizer."),
        "timing_s/forward_backward": _of_step(
            "forward_backward_seconds", "Forward and backward passes of the updates."
        ),
        "timing_s/optimizer": _of_step("optimizer_seconds", "The optimizer's part of the updates."),
        "timing_s/weight_sync": _of_step(
            "weight_sync_seconds", "For how long the new version kept the trainer: its snapshot, the wait for a sync."
        ),
        "timing_s/snapshot": _of_step("snapshot_seconds", "Of that: weights, digests, the probe's log-probs."),
        "timing_s/broadcast": _of_step("broadcast_seconds", "Of `weight_sync/seconds`: sending the weights."),
        "timing_s/checkpoint": _of_step("checkpoint_seconds", "Writing the checkpoint."),
        "timing_s/validation": _of_step("validation_seconds", "Measuring the policy on the validation questions."),
    }
)
"""Name in metrics.jsonl, which is the reference run's where it has one -> gauge."""


def set_step(line: Mapping[str, float]) -> None:
    """Show a line of metrics.jsonl. A time that the step did not spend is 0; a metric that it lacks stays as it was."""
    POLICY_VERSION.set(line["policy_version"])
    for name, gauge in STEP_GAUGES.items():
        if name in line or name.startswith("timing_s/"):
            gauge.set(line.get(name, 0.0))
    set_validation(line)


def set_validation(metrics: Mapping[str, float]) -> None:
    """Show a validation, which may end beside a later step."""
    for name, value in metrics.items():
        if name.startswith(VALIDATION_PREFIX):
            source, _, statistic = name.removeprefix(VALIDATION_PREFIX).partition("/acc/")
            VALIDATION_SCORE.labels(source, statistic).set(value)
