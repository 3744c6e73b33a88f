"""Every metric of the rollout service."""

from prometheus_client import Counter, Gauge, Histogram

GROUPS = Counter("rollout_groups_total", "Groups sampled, scored and submitted.")
DUPLICATE_GROUPS = Counter("rollout_duplicate_groups_total", "Groups that another replica had submitted before.")
GIVEN_BACK_GROUPS = Counter(
    "rollout_given_back_groups_total", "Groups returned to the queue, because nobody scored them."
)
TOKENS = Counter("rollout_completion_tokens_total", "Completion tokens sampled.")
GENERATE_SECONDS = Histogram("rollout_generate_seconds", "Sampling one group.")
SCORE_SECONDS = Histogram("rollout_score_seconds", "Scoring one group.")
POLICY_VERSION = Gauge("rollout_policy_version", "Policy version being served; -1 before the first.")
GROUPS_IN_HAND = Gauge("rollout_groups_in_hand", "Groups being sampled or scored.")
