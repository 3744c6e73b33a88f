"""When a run must not go on: the engine disagrees with the trainer, or gradients are not finite any more.

What a guard objects to is kept, so that `retort replay` can train on it again.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from retort.config import TrainerConfig
from retort.rollouts import Message, RolloutGroup
from retort.telemetry import log_event
from services.trainer.batch import StepBatch
from services.trainer.update import Update

FEWEST_MIXED_GROUPS = 0.05
MOST_COMPLETIONS_CUT = 0.5
LEAST_ENTROPY, OF_A_POLICY_BELOW = 0.01, 0.5
"""A policy that is certain is no bad sign where its rewards are good. All limits are those of alerts.yaml."""


class DivergedError(Exception):
    """Training has left the numbers with which it can go on. Exit code 5."""


class KeptStep(Message, frozen=True, kw_only=True):
    """A step, as far as it had come, to which a guard objected. msgpack keeps every bit, those of NaN included."""

    step: int
    why: str
    groups: list[RolloutGroup]
    losses: list[float]
    """Of the updates that were made or skipped."""
    grad_norms: list[float]


class Guards:
    """Raise DivergedError, with the number that broke the limit and what to look at."""

    def __init__(self, config: TrainerConfig, keep: Callable[[KeptStep], None]) -> None:
        """`keep` is given the step whenever a guard has an objection."""
        self._config = config
        self._keep = keep
        self._skipped_in_a_row = 0
        self._groups: list[RolloutGroup] = []
        self._updates: list[Update] = []
        self._step = 0

    def check_engine(self, batch: StepBatch) -> None:
        """Compare what the engine said when it sampled with what the trainer says of the same tokens.

        Of completions that the step's own version sampled: an older one rightly says something else. Whether the
        engine computes as the trainer does, the probe of every weight sync asks besides.
        """
        if batch.step != self._step:
            self._step, self._groups, self._updates = batch.step, [], []
        self._groups += batch.groups
        rows = [row for row in batch.scored_rows if set(batch.rollouts[row].policy_versions) <= {batch.step - 1}]
        tokens = batch.tokens_of(rows)
        if not len(tokens):
            return
        gap = float((batch.old_logprobs[tokens] - batch.rollout_logprobs[tokens]).abs().mean())
        if not gap <= self._config.max_logprob_gap:
            self._stop(
                f"step {batch.step}: log-probs of engine and trainer differ by {gap:.3g} a token on average, and "
                f"trainer.max_logprob_gap is {self._config.max_logprob_gap:g} ({_by_replica(batch, rows)}). Nothing "
                "was learned from it. One replica alone: its log and its versions. All of them: model.dtype, the "
                "engine's version."
            )

    def check_updates(self, updates: Sequence[Update]) -> None:
        """Count updates that were skipped for a loss or a gradient that is not finite."""
        self._updates += updates
        for update in updates:
            self._skipped_in_a_row = 0 if update.is_finite else self._skipped_in_a_row + 1
            if not update.is_finite:
                log_event("update_skipped", logging.WARNING, grad_norm=update.grad_norm, loss=update.loss)
            if self._skipped_in_a_row >= self._config.max_skipped_updates:
                self._stop(
                    f"{self._skipped_in_a_row} updates in a row had a gradient that is not finite "
                    f"(trainer.max_skipped_updates = {self._config.max_skipped_updates}). Lower trainer.learning_rate "
                    f"and resume from the last checkpoint; `retort replay RUN_DIR --step {self._step}` repeats them."
                )
        if not all(update.is_finite for update in updates):
            self._keep_step("updates were skipped, because their gradient was not finite")

    def _stop(self, why: str) -> None:
        self._keep_step(why)
        raise DivergedError(why)

    def _keep_step(self, why: str) -> None:
        losses, grad_norms = [one.loss for one in self._updates], [one.grad_norm for one in self._updates]
        self._keep(KeptStep(step=self._step, why=why, groups=self._groups, losses=losses, grad_norms=grad_norms))


def collapse_signals(metrics: Mapping[str, float]) -> list[str]:
    """What a step's metrics say of a policy that stops learning: one sentence each."""
    signals = []
    if metrics["critic/mixed_group_fraction"] < FEWEST_MIXED_GROUPS:
        signals.append("in almost every group all rewards are equal: there is nothing to learn from")
    if metrics["response_length/clip_ratio"] > MOST_COMPLETIONS_CUT:
        signals.append("most completions are cut at sampling.max_completion_tokens")
    if metrics.get("actor/entropy", 1.0) < LEAST_ENTROPY and metrics["critic/score/mean"] < OF_A_POLICY_BELOW:
        signals.append("the policy is certain and mostly wrong: nothing new is tried")
    return signals


def _by_replica(batch: StepBatch, rows: Sequence[int]) -> str:
    """`rollout-0 0.01, rollout-1 1.7`: the mean gap of what each replica sampled."""
    gaps: dict[str, list[float]] = defaultdict(list)
    replicas = [group.sampled_by for group in batch.groups for _ in group.rollouts]
    for row in rows:
        tokens = batch.tokens_of([row])
        gaps[replicas[row]] += (batch.old_logprobs[tokens] - batch.rollout_logprobs[tokens]).abs().tolist()
    return ", ".join(f"{replica} {fmean(found):.3g}" for replica, found in sorted(gaps.items()) if found)
