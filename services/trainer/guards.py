"""When a run must not go on: the engine disagrees with the trainer, or gradients are not finite any more."""

import logging
from collections.abc import Sequence

from retort.config import TrainerConfig
from retort.telemetry import log_event
from services.trainer.batch import StepBatch
from services.trainer.update import Update


class DivergedError(Exception):
    """Training has left the numbers with which it can go on. Exit code 5."""


class Guards:
    """Raise DivergedError, with the number that broke the limit and what to look at."""

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config
        self._skipped_in_a_row = 0

    def check_engine(self, batch: StepBatch) -> None:
        """Compare what the engine said when it sampled with what the trainer says of the same tokens."""
        tokens = batch.tokens_of(batch.scored_rows)
        if not len(tokens):
            return
        gap = float((batch.old_logprobs[tokens] - batch.rollout_logprobs[tokens]).abs().mean())
        if not gap <= self._config.max_logprob_gap:
            raise DivergedError(
                f"step {batch.step}: log-probs of engine and trainer differ by {gap:.3g} a token on average, and "
                f"trainer.max_logprob_gap is {self._config.max_logprob_gap:g}. They do not hold the same weights or "
                "do not compute alike: compare model.dtype, the engine's version and its log."
            )

    def check_updates(self, updates: Sequence[Update]) -> None:
        """Count updates that were skipped for a gradient that is not finite."""
        for update in updates:
            self._skipped_in_a_row = 0 if update.is_finite else self._skipped_in_a_row + 1
            if not update.is_finite:
                log_event("update_skipped", logging.WARNING, grad_norm=update.grad_norm, loss=update.loss)
            if self._skipped_in_a_row >= self._config.max_skipped_updates:
                raise DivergedError(
                    f"{self._skipped_in_a_row} updates in a row had a gradient that is not finite "
                    f"(trainer.max_skipped_updates = {self._config.max_skipped_updates}). Lower trainer.learning_rate "
                    "and resume from the last checkpoint."
                )
